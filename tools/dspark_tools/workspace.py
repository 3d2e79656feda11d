"""The folder that tools may touch, and the only door into it.

Names are walked one component at a time, each opened relative to the folder before it and never
through a symbolic link (``openat`` with ``O_NOFOLLOW``). The check and the use are therefore one
act: swapping a folder for a link between the two gains nothing. Needs a POSIX system.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dspark_agent import ModelRetry

SKIPPED_FOLDERS = frozenset(
    {
        ".git",
        ".hg",
        ".hypothesis",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".tox",
        ".venv",
        "__pycache__",
        "node_modules",
    }
)
"""Folders that listings and searches leave out: caches, environments, version control."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a named pipe would wait for a writer that never comes.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class WorkspaceError(ModelRetry):
    """A name or a file a tool cannot work with. The message is written for the model to act on."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A regular file of the workspace: its name relative to the root, with ``/``, and its size."""

    name: str
    size_bytes: int


class Workspace:
    """A folder tree, and reading, writing and listing that cannot leave it.

    Hard links into the tree are outside what a path check can see, and a *program* started in
    the workspace (:mod:`dspark_tools.process`) has the user's rights: contain those with an
    operating-system sandbox where the model is not trusted.

    Args:
        root: An existing folder. Links in this name itself are followed, once, here.
        max_file_bytes: The largest file that is read or written.

    Raises:
        NotADirectoryError: ``root`` is not an existing folder.
    """

    def __init__(self, root: str | Path, *, max_file_bytes: int = 1 << 20) -> None:
        resolved = Path(root).resolve()
        if not resolved.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, "a workspace must be an existing folder", str(root)
            )
        self.root = resolved
        self.max_file_bytes = max_file_bytes

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r})"

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a regular file. Raises :class:`WorkspaceError`."""
        parts = split_name(name)
        with self._folder(parts[:-1], name) as folder:
            try:
                descriptor = os.open(_last(parts, name), _READ, dir_fd=folder)
            except OSError as error:
                raise _explain(error, name) from None
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise WorkspaceError(f"{name!r} is a folder; give the name of a file in it.")
            if not stat.S_ISREG(status.st_mode):
                raise WorkspaceError(f"{name!r} is not a regular file.")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(self.max_file_bytes + 1)
        finally:
            os.close(descriptor)
        self._check_size(len(data), name)
        return data

    def read_text(self, name: str) -> str:
        """A file's text, line ends as they are. Raises :class:`WorkspaceError` if not UTF-8."""
        try:
            return self.read_bytes(name).decode()
        except UnicodeDecodeError as error:
            raise WorkspaceError(
                f"{name!r} is not UTF-8 text (byte {error.start}); it cannot be shown or edited."
            ) from None

    def write_text(self, name: str, text: str) -> None:
        """Creates or replaces a file in one step, making its folders; keeps an old file's mode.

        Raises:
            WorkspaceError: The name is not usable, the text too large, or the file cannot be
                written.
        """
        parts = split_name(name)
        last = _last(parts, name)
        if ".git" in parts:
            raise WorkspaceError(f"{name!r} belongs to git; it cannot be written.")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise WorkspaceError(
                f"the text for {name!r} has a character that UTF-8 cannot hold, "
                f"at position {error.start}."
            ) from None
        self._check_size(len(data), name)
        with self._folder(parts[:-1], name, create=True) as folder:
            try:
                _replace(folder, last, data)
            except OSError as error:
                raise _explain(error, name) from None

    def files(self, folder: str = ".") -> Iterator[FileEntry]:
        """The regular files below ``folder``, sorted by name; links and caches are left out.

        Raises:
            WorkspaceError: ``folder`` is not a folder of the workspace.
        """
        parts = split_name(folder)
        found: list[FileEntry] = []
        with self._folder(parts, folder) as top:
            for here, folders, names, descriptor in os.fwalk(dir_fd=top):
                folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
                prefix = (*parts, *Path(here).parts)
                for name in names:
                    # A file may vanish between the listing and the look at it.
                    with suppress(FileNotFoundError):
                        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            found.append(FileEntry("/".join((*prefix, name)), status.st_size))
        return iter(sorted(found, key=lambda entry: entry.name))

    def _check_size(self, size_bytes: int, name: str) -> None:
        if size_bytes > self.max_file_bytes:
            raise WorkspaceError(
                f"{name!r} is larger than the {self.max_file_bytes:,} bytes that tools handle."
            )

    @contextmanager
    def _folder(self, parts: tuple[str, ...], name: str, *, create: bool = False) -> Iterator[int]:
        """A descriptor of the folder ``parts``, reached without following a link."""
        descriptor = os.open(self.root, _FOLDER)
        try:
            for part in parts:
                try:
                    if create:
                        with suppress(FileExistsError):
                            os.mkdir(part, dir_fd=descriptor)
                    inner = os.open(part, _FOLDER, dir_fd=descriptor)
                except OSError as error:
                    raise _explain(error, name, descriptor, part) from None
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)


def split_name(name: str) -> tuple[str, ...]:
    """The components of a name relative to the root; ``()`` for ``"."``.

    Raises:
        WorkspaceError: The name is empty, absolute, has ``..`` or a character no name can have.
    """
    if not name.strip() or "\0" in name:
        raise WorkspaceError(f"{name!r} is not a file name.")
    if name.startswith(("/", "~")):
        raise WorkspaceError(
            f"{name!r} is outside the workspace: give a name relative to its root, "
            "such as 'src/module.py'."
        )
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise WorkspaceError(
            f"{name!r} has '..': names start at the root of the workspace and only go down."
        )
    return parts


def _last(parts: tuple[str, ...], name: str) -> str:
    if not parts:
        raise WorkspaceError(f"{name!r} is the workspace itself; give the name of a file in it.")
    return parts[-1]


def _replace(folder: int, last: str, data: bytes) -> None:
    """Writes beside the file and renames over it, so that no reader sees half a file."""
    try:
        old = os.stat(last, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        mode = None
    else:
        if stat.S_ISLNK(old.st_mode):
            raise OSError(errno.ELOOP, "symbolic link")
        if stat.S_ISDIR(old.st_mode):
            raise OSError(errno.EISDIR, "folder")
        mode = stat.S_IMODE(old.st_mode)
    fresh = f".{secrets.token_hex(8)}.tmp"
    try:
        with open(os.open(fresh, _CREATE, 0o666, dir_fd=folder), "wb") as file:
            file.write(data)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
        os.replace(fresh, last, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=folder)
        raise


def _explain(
    error: OSError, name: str, folder: int | None = None, part: str | None = None
) -> WorkspaceError:
    """The system's refusal in words that tell the model what to do instead."""
    if folder is not None and part is not None and error.errno in (errno.ENOTDIR, errno.ELOOP):
        # Linux reports a link in a folder's place as "not a directory".
        with suppress(OSError):
            if stat.S_ISLNK(os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode):
                error = OSError(errno.ELOOP, "symbolic link")
    match error.errno:
        case errno.ENOENT:
            reason = "does not exist; list the files to see what there is."
        case errno.ELOOP:
            reason = "goes through a symbolic link; links are not followed."
        case errno.ENOTDIR:
            reason = "treats a file as a folder; list the files to see what there is."
        case errno.EISDIR:
            reason = "is a folder; give the name of a file in it."
        case errno.ENAMETOOLONG:
            reason = "is too long for a file name."
        case errno.EACCES | errno.EPERM:
            reason = "may not be opened: permission denied."
        case _:
            reason = f"cannot be opened: {error.strerror}."
    return WorkspaceError(f"{name!r} {reason}")
