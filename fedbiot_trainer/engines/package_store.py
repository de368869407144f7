"""The emulator packages of a site, on its disk."""

import hashlib
import os
import shutil
from pathlib import Path

from transformers.utils import logging

from ..wire.frame import PayloadError, shown
from ..wire.shipment import PackageFile, PackageList


logger = logging.get_logger(__name__)


class PackageStore:
    """
    Files by their digest, so that what is in two packages is sent once, and packages as folders of them. A file that
    arrives is written behind what came before, and has its place only when its digest is right.

    Args:
        folder (`str` or `Path`): Where to keep them.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = self.folder / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self._verified: set[str] = set()  # digests that a file was seen to have, by this process

    def had(self, package: PackageList) -> dict[str, int]:
        """Bytes that are here of each file of a package; one of which nothing is here is not named."""
        had = {}
        for file in package.files:
            whole, part = self._paths(file)
            if part.is_file() and part.stat().st_size >= file.size:  # the site ended before it was looked at
                self._settle(file)
            if whole.is_file() and self._is_whole(file):
                had[file.name] = file.size
            elif part.is_file():
                had[file.name] = part.stat().st_size
        return had

    def _is_whole(self, file: PackageFile) -> bool:
        """
        Whether a file is still what came, looked at once by each process. One that is not goes, and the package of it too: its
        content is the same on disk.
        """
        whole = self._paths(file)[0]
        if file.sha256 not in self._verified:
            with whole.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                    logger.warning(
                        f"'{file.name}' of the package is not what it was when it came, and is fetched again."
                    )
                    whole.unlink()
                    self._remove_packages()
                    return False
            self._verified.add(file.sha256)
        return True

    def _remove_packages(self):
        for folder in self.folder.glob("package-*"):
            shutil.rmtree(folder)

    def write(self, file: PackageFile, offset: int, content: memoryview):
        """
        Write a piece of a file.

        Raises:
            PayloadError: If it does not follow what is here, or the whole file has another digest; it then begins anew.
            OSError: If the disk is full.
        """
        part = self._paths(file)[1]
        here = part.stat().st_size if part.is_file() else 0
        if offset != here or offset + len(content) > file.size:
            raise PayloadError(
                f"A piece of '{file.name}' is for bytes {offset:,} to {offset + len(content):,} of {file.size:,}, but {here:,} "
                "are here."
            )
        with part.open("ab") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        if offset + len(content) < file.size:
            return
        digest = self._settle(file)
        if digest != file.sha256:
            raise PayloadError(f"'{file.name}' has arrived with the digest {shown(digest)}, expected {file.sha256}.")

    def _settle(self, file: PackageFile) -> str:
        """Put a file that has all its bytes in its place, or away if its digest is another. Returns the digest."""
        whole, part = self._paths(file)
        with part.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        if digest == file.sha256:
            part.rename(whole)
            self._verified.add(digest)
        else:
            part.unlink()
        return digest

    def path(self, package: PackageList) -> Path:
        """The folder of a package, which is there once it is assembled."""
        return self.folder / f"package-{package.digest[:16]}"

    def assemble(self, package: PackageList):
        """Make the folder of a package, if all of its files are here, and delete others and what they alone had."""
        folder = self.path(package)
        if all(self._paths(file)[0].is_file() for file in package.files) and not self._is_assembled(package):
            self._remove_packages()
            part = folder.with_name(f"part-{folder.name}")
            shutil.rmtree(part, ignore_errors=True)
            for file in package.files:
                target = part / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._paths(file)[0], target)
            part.rename(folder)
            kept = {path.name for file in package.files for path in self._paths(file)}
            for other in self.files.iterdir():
                if other.name not in kept:
                    other.unlink()

    def _is_assembled(self, package: PackageList) -> bool:
        targets = {self.path(package) / file.name: self._paths(file)[0] for file in package.files}
        return all(target.is_file() and target.samefile(whole) for target, whole in targets.items())

    def _paths(self, file: PackageFile) -> tuple[Path, Path]:
        """Where it is when it is whole, and until then."""
        return self.files / file.sha256, self.files / f"{file.sha256}.part"
