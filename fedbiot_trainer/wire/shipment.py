"""An emulator package on its way to a site: a list of its files, then their content in pieces."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .frame import PayloadError, encode, shown, unpack


# What a package is made of: nothing that could run, nothing outside its folder.
FILE_NAME = re.compile(
    r"((client|emulator)_lora/|additional_chat_templates/)?\w[\w\-]*(\.[\w\-]+)*\.(safetensors|json|jinja|txt|model|md)",
    re.ASCII,
)
MAX_NAME = 200  # characters
MAX_FILES = 300
PIECE = 16 * 2**20  # bytes


@dataclass(frozen=True)
class PackageFile:
    """
    Attributes:
        name (`str`): Its path in the package.
        size (`int`): In bytes.
        sha256 (`str`): Of its content, in hexadecimal digits.
    """

    name: str
    size: int
    sha256: str

    def check(self):
        """
        Raises:
            PayloadError: If a package cannot have such a file.
        """
        if type(self.name) is not str or len(self.name) > MAX_NAME or not FILE_NAME.fullmatch(self.name):
            raise PayloadError(
                f"The package has a file {shown(self.name)}, but a site takes weights and settings alone: .safetensors, .json, "
                ".jinja, .txt, .model and .md files, and no code."
            )
        if type(self.size) is not int or self.size < 0:
            raise PayloadError(f"File '{self.name}' of the package has a size of {shown(self.size)} bytes.")
        if type(self.sha256) is not str or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise PayloadError(
                f"File '{self.name}' of the package has the digest {shown(self.sha256)}, which is no SHA-256."
            )


@dataclass(frozen=True)
class PackageList:
    """
    The files of an emulator package.

    Attributes:
        files (`tuple[PackageFile, ...]`): In the order of their names.
    """

    files: tuple[PackageFile, ...]

    @property
    def num_bytes_of_loras(self) -> int:
        """What a site is sent anew in each round, and sends a part of back."""
        return sum(file.size for file in self.files if file.name.startswith(("client_lora/", "emulator_lora/")))

    @classmethod
    def of(cls, folder: str | Path, known: dict[tuple[str, int, int], str] | None = None) -> "PackageList":
        """
        The files in a folder.

        Args:
            folder (`str` or `Path`): The package.
            known (`dict`, *optional*): Digests of files that were read before, by name, size and time; this call adds its own.

        Raises:
            PayloadError: If one of them is nothing that a site would take.
        """
        folder, files, known = Path(folder), [], {} if known is None else known
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, stat = path.relative_to(folder).as_posix(), path.stat()
            version = name, stat.st_size, stat.st_mtime_ns
            if version not in known:
                with path.open("rb") as content:
                    known[version] = hashlib.file_digest(content, "sha256").hexdigest()
            files.append(PackageFile(name, stat.st_size, known[version]))
        return cls(tuple(files)).checked()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """Tells packages apart: the same for the same files."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def checked(self) -> "PackageList":
        """
        Itself.

        Raises:
            PayloadError: If this cannot be a package.
        """
        names = [file.name for file in self.files]
        for file in self.files:
            file.check()
        if not 1 <= len(names) <= MAX_FILES or len(set(names)) < len(names):
            raise PayloadError(f"The package has {len(names)} files, expected 1 to {MAX_FILES} of different names.")
        return self

    def to_bytes(self) -> bytes:
        """Encode it, for a site to say which of the files it has."""
        return encode({"kind": "package_list", "files": [asdict(file) for file in self.files]}, b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> "PackageList":
        """
        Raises:
            PayloadError: If it is damaged, or lists what a package cannot have.
        """
        manifest, _ = unpack("package list", data)
        files = manifest.get("files")
        known = set(PackageFile.__dataclass_fields__)
        if not isinstance(files, list) or not all(isinstance(file, dict) and file.keys() == known for file in files):
            raise PayloadError(f"The package list has files {shown(files)}, expected name, size and sha256 of each.")
        return cls(tuple(PackageFile(**file) for file in files)).checked()

    def pieces(self, had: dict[str, int], size: int = PIECE) -> "Iterator[Piece]":
        """
        What a site lacks.

        Args:
            had (`dict[str, int]`): Bytes that the site has of each file; of one that is not named, none.
            size (`int`, *optional*): Bytes of a piece, at most.

        Yields:
            [`Piece`]: In the order of the files. A file that is empty has one.
        """
        for file in self.files:
            start = had.get(file.name)
            if start != file.size:
                for offset in range(start or 0, max(file.size, 1), size):
                    yield Piece(file.name, offset, size)


@dataclass(frozen=True)
class Piece:
    """
    Attributes:
        file (`str`): Its name in the package.
        offset (`int`): Where in it the piece begins, in bytes.
        size (`int`): Bytes, at most: less at the end of the file.
    """

    file: str
    offset: int
    size: int

    def read(self, folder: str | Path) -> bytes:
        """The payload for [`read_piece`], from the package in `folder`."""
        with Path(folder, self.file).open("rb") as content:
            content.seek(self.offset)
            place = {"kind": "package_piece", "file": self.file, "offset": self.offset}
            return encode(place, content.read(self.size))


def read_piece(data: bytes) -> tuple[str, int, memoryview]:
    """
    Name of a file, where in it, and what to write there.

    Raises:
        PayloadError: If it is damaged.
    """
    manifest, content = unpack("piece of the package", data)
    name, offset = manifest.get("file"), manifest.get("offset")
    if type(name) is not str or type(offset) is not int or offset < 0:
        raise PayloadError(
            f"The piece is of file {shown(name)} at {shown(offset)}, expected a name and a place in it."
        )
    return name, offset, content
