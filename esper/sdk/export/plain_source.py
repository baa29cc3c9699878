"""Source text that needs torch alone, put together from the definitions that something needs.

A class is copied with every function, constant and base class of Esper that it names, and with the
imports of everything else. Type hints are left out, and methods that only training needs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable
from functools import cache
from types import ModuleType

from esper.exceptions import ConfigurationError

_PACKAGE = "esper"
# An exported layer is never grafted, merged or moved on again.
_TRAINING_METHODS = frozenset(
    {"inherit", "on_step", "merge", "signals", "forget", "attach", "detach", "__getstate__"}
)
_HEADER = '''"""Made by esper.export: one model's grafts as plain PyTorch. It needs torch alone.

    import grafted
    model = grafted.load(TheModel(...), "the folder of this file")
"""

'''

Place = tuple[str, str]  # (module, name)


class PlainSource:
    """Collects definitions; :meth:`text` is a file that defines them all."""

    def __init__(self) -> None:
        self._imports: dict[str, None] = {}  # a set that keeps its order
        self._written: dict[Place, str] = {}
        self._names: dict[str, Place] = {}
        self._open: set[Place] = set()

    def add(self, module: str, name: str) -> None:
        """The definition of ``module.name``, after everything that it needs.

        Raises:
            ConfigurationError: two definitions have the same name, or one was not found.
        """
        module, name = _home(module, name)
        place = (module, name)
        if place in self._written or place in self._open:
            return
        if self._names.setdefault(name, place) != place:
            other = self._names[name][0]
            raise ConfigurationError(
                f"two classes of the grafts use the name {name}: in {module} and in {other}"
            )
        self._open.add(place)
        node = _definition(module, name)
        plain = _Plain(module)
        written = plain.visit(node)
        for needed in sorted(plain.needed):
            self._need(module, *needed)
        self._written[place] = ast.unparse(ast.fix_missing_locations(written))

    def text(self) -> str:
        imports = "\n".join(self._imports)
        return _HEADER + imports + "\n\n\n" + "\n\n\n".join(self._written.values()) + "\n"

    def _need(self, module: str, name: str, attribute: str) -> None:
        """``name``, or where it is one of Esper's modules the ``attribute`` of it."""
        imported = _import_of(module, name)
        if imported is None:
            self.add(module, name)
        elif not imported.startswith(_PACKAGE):
            self._imports[imported] = None
        elif attribute:
            self.add(imported, attribute)
        else:
            source, _, original = imported.rpartition(".")
            self.add(source, original)


class _Plain(ast.NodeTransformer):
    """Removes type hints and collects the global names that are used.

    Attributes:
        needed: (name, attribute); the attribute is empty unless the name is a module of Esper.
    """

    def __init__(self, module: str) -> None:
        self.needed: set[tuple[str, str]] = set()
        self._module = module
        self._globals = _global_names(module)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self._globals and isinstance(node.ctx, ast.Load):
            self.needed.add((node.id, ""))
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        base = node.value
        if isinstance(base, ast.Name) and _is_own_module(_import_of(self._module, base.id)):
            self.needed.add((base.id, node.attr))
            return ast.copy_location(ast.Name(node.attr, ast.Load()), node)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        plain = ast.Assign([node.target], node.value)
        return self.generic_visit(ast.copy_location(plain, node))

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if _is_layer(self._module, node.name):
            node.body = [part for part in node.body if not _is_for_training(part)]
        plain = self.generic_visit(node)
        assert isinstance(plain, ast.ClassDef)
        plain.body = plain.body or [ast.Pass()]
        return plain


def source_of(classes: Iterable[type]) -> str:
    """Source that defines the classes, changed as the module's docstring says."""
    source = PlainSource()
    for needed in classes:
        source.add(needed.__module__, needed.__name__)
    return source.text()


def _is_layer(module: str, name: str) -> bool:
    from torch import nn

    found = getattr(importlib.import_module(module), name, None)
    return isinstance(found, type) and issubclass(found, nn.Module)


def _is_for_training(part: ast.stmt) -> bool:
    return isinstance(part, ast.FunctionDef) and part.name in _TRAINING_METHODS


@cache
def _tree(module: str) -> ast.Module:
    loaded: ModuleType = importlib.import_module(module)
    return ast.parse(inspect.getsource(loaded))


def _definition(module: str, name: str) -> ast.stmt:
    for node in _tree(module).body:
        if name in _bound_by(node):
            return ast.parse(ast.unparse(node)).body[0]  # a copy, to be changed
    raise ConfigurationError(f"{module} defines no {name}")


def _bound_by(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def _global_names(module: str) -> set[str]:
    bound = set().union(*map(_bound_by, _tree(module).body))
    return bound | _imports(module).keys()


@cache
def _imports(module: str) -> dict[str, str]:
    """name -> dotted name of something of Esper's, or the statement that imports it."""
    found = {}
    for node in _tree(module).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[(alias.asname or alias.name).split(".")[0]] = ast.unparse(ast.Import([alias]))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                own = node.module.split(".")[0] == _PACKAGE
                single = ast.unparse(ast.ImportFrom(node.module, [alias], 0))
                name = alias.asname or alias.name
                found[name] = f"{node.module}.{alias.name}" if own else single
    return found


def _import_of(module: str, name: str) -> str | None:
    return _imports(module).get(name)


def _home(module: str, name: str) -> Place:
    """Where a name that is imported through packages is defined."""
    while (further := _import_of(module, name)) is not None and further.startswith(_PACKAGE):
        module, _, name = further.rpartition(".")
    return module, name


def _is_own_module(dotted: str | None) -> bool:
    if dotted is None or not dotted.startswith(f"{_PACKAGE}."):
        return False
    parent, _, name = dotted.rpartition(".")
    return isinstance(getattr(importlib.import_module(parent), name, None), ModuleType)
