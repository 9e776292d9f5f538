"""The files of a data folder: linked folders are followed, each real one once, and what is not read is named."""

from collections import Counter
from pathlib import Path

from lowrank_cli.data.records import ending
from lowrank_cli.errors import UsageError


def files_below(root: Path) -> tuple[list[Path], str]:
    """Find the files of a folder that can be read, hidden ones left out.

    Args:
        root: a folder.
    Returns:
        The files, sorted by their paths below the folder; and what is not read, such as "3 files are not read:
        2 .zst, 1 .xz", "" if everything is.
    Raises:
        UsageError: a folder cannot be listed.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    broken: list[str] = []
    # a link to a folder above would bring in what lies beside the data
    seen = {_identity(parent) for parent in root.resolve().parents}
    # linked folders wait for the real ones: one that is both is read by its own path
    real, linked = [root], []
    while real or linked:
        folder = (real or linked).pop(0)
        try:
            if _identity(folder) in seen:
                continue
            seen.add(_identity(folder))
            for path in sorted(folder.iterdir()):
                if path.name.startswith("."):
                    continue
                if path.is_dir():
                    (linked if path.is_symlink() else real).append(path)
                elif not path.is_file():
                    broken.append(path.relative_to(root).as_posix())
                elif ending(path):
                    found.append(path)
                else:
                    others[path.suffix.lower() or "without an ending"] += 1
        except OSError as error:
            raise UsageError(f"{folder} cannot be read: {error.strerror}", "check the folder's permissions") from None
    left = [f"{count:,} {name}" for name, count in sorted(others.items(), key=lambda item: (-item[1], item[0]))]
    left += [f"{name}, which is a broken link or no file" for name in broken]
    count = others.total() + len(broken)
    files = "file is" if count == 1 else "files are"
    return (
        sorted(found, key=lambda path: path.relative_to(root).as_posix()),
        f"{count:,} {files} not read: {', '.join(left)}" if left else "",
    )


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
