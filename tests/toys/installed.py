"""Packages that seem to be installed, so that their entry points are found."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def install(folder: Path, package: str, **points: str) -> Path:
    """Write the metadata of a package into ``folder``, which has to be put on the path of modules.

    Args:
        folder: Where to.
        package: The name of the package.
        points: By group, with ``_`` for a dot, its entry point, ``name = module:object``.
    """
    metadata = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    groups = (f"[{group.replace('_', '.')}]\n{point}\n" for group, point in points.items())
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    return folder
