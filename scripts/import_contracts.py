"""An import contract of our own: apps reach one another through their doors only."""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class DoorContract(Contract):
    """Of another app, only the modules named in ``door`` may be imported.

    Attributes:
        package: the package whose children are the apps.
        door: modules of an app that other apps may import.
        open_apps: apps that are made to be imported whole, such as the ground of all others.
    """

    type_name = "door"

    package = fields.StringField()
    door = fields.SetField(subfield=fields.StringField())
    open_apps = fields.SetField(subfield=fields.StringField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Every import of a module that is behind another app's door, with its line."""
        found = [
            f"{importer} imports {imported} (line {_line(graph, importer, imported)})"
            for importer in sorted(graph.modules)
            for imported in sorted(graph.find_modules_directly_imported_by(importer))
            if self._is_behind_a_door(importer, imported)
        ]
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print what was found, and what to do about it."""
        for line in check.metadata["found"]:
            output.print_error(line)
        output.print_error(f"Import it through one of: {', '.join(sorted(self.door))}.")

    def _is_behind_a_door(self, importer: str, imported: str) -> bool:
        where, what = self._place(importer), self._place(imported)
        if where is None or what is None or where[0] == what[0] or what[0] in self.open_apps:
            return False
        return what[1] not in self.door

    def _place(self, module: str) -> tuple[str, str] | None:
        """(app, module in it), None outside the package."""
        package, _, rest = module.partition(".")
        app, _, inner = rest.partition(".")
        return (app, inner.split(".")[0]) if package == self.package and app else None


def _line(graph: ImportGraph, importer: str, imported: str) -> int:
    details = graph.get_import_details(importer=importer, imported=imported)
    return details[0]["line_number"]
