// The texts of the scripts in the page's language: Django's catalogue, which only a page in another
// language than English has loaded.
export const language = document.documentElement.lang;

const fill = (text, values) => text.replace(/%\((\w+)\)s/g, (_, name) => values[name]);

export function gettext(text, values = {}) {
  return fill(globalThis.django?.gettext?.(text) ?? text, values);
}

// `counter` chooses the form, and is a value too.
export function ngettext(one, many, counter, values = {}) {
  const plain = counter === 1 ? one : many;
  return fill(globalThis.django?.ngettext?.(one, many, counter) ?? plain, { counter, ...values });
}

export const inWords = (number, options) => number.toLocaleString(language, options);
