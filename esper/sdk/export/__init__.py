"""A trained model without Esper: as a plain module, in a framework's checkpoint, in ``generate``.

:mod:`esper.sdk.export.generating` needs transformers, so it is imported only by who uses it.
"""

from esper.sdk.export.exporting import export

__all__ = ["export"]
