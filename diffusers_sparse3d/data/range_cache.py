"""A local cache of what was read of remote folders, of bounded size."""

import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from ..files import PARTIAL
from .sections import HASH_BYTES, content_hash


logger = logging.getLogger(__name__)

# Seconds that a process waits for others that change the list of files.
TIMEOUT = 60.0
# Minutes in which a folder is searched for files of killed processes only once: a million files cost seconds, and all
# processes of a training start together.
SEARCH_MINUTES = 10
# What goes wrong on a full or failing disk, in files and in their list; and this, or that the list is damaged.
DISK_ERRORS = (OSError, sqlite3.OperationalError)
CACHE_ERRORS = (OSError, sqlite3.DatabaseError)
LIST = "files.sqlite"
NEW_LIST = LIST + PARTIAL
# A file of the cache, or one that was being written; whatever else lies in the folder is not the cache's to delete.
OWN_FILE = re.compile(rf"[0-9a-f]{{{2 * HASH_BYTES}}}({re.escape(PARTIAL)})?")

# Folders of which this process has said that they fail.
_failing: set[Path] = set()


class RangeCache:
    """Bytes by their content hash in files of a folder, at most so many in all; what was used last is kept.

    Any number of processes and threads of one machine may share a folder. What is in the cache can never be stale, as
    its name is its content's, which is checked when it is fetched. A file is written beside its place and renamed;
    when it is gone or of another size, it is fetched again: its content is not checked each time it is read, as that
    takes longer than reading it. When the disk is full or fails, or the list of the files is damaged, what is asked
    for is fetched every time, and that is said once. A damaged list is made anew at the next start: the cache is empty
    then.

    Args:
        folder: A local folder, which is made if there is none.
        max_bytes: Largest sum of the sizes of the files.

    Raises:
        ValueError: if `max_bytes` is not positive.
    """

    def __init__(self, folder: str | Path, max_bytes: int):
        if max_bytes <= 0:
            raise ValueError(f"`max_bytes` must be positive, got {max_bytes}")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._make_list(LIST)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            self._make_list_anew()

    def _make_list(self, name: str) -> None:
        """Makes the list of files, of this name, if there is none.

        Raises:
            sqlite3.DatabaseError: if there is a damaged one.
        """
        with self._database(name) as database:
            (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state.splitlines()[-1])
            database.execute("CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, size INTEGER, used REAL)")
            database.execute("CREATE INDEX IF NOT EXISTS by_use ON files (used)")
            database.execute("CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY CHECK (id = 0), bytes INTEGER)")
            database.execute("INSERT OR IGNORE INTO total VALUES (0, 0)")
            try:
                self._remove_unlisted(database)
            except DISK_ERRORS as error:
                self._warn(error)

    def _make_list_anew(self) -> None:
        """Deletes a damaged list and makes it anew, unless another process that starts has done so by now."""
        with _locked(self.folder):
            try:
                self._make_list(LIST)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                logger.warning(
                    "The list of the cache in %s is damaged (%s): it is made anew, and the cache is filled again.",
                    self.folder,
                    error,
                )
                # Made under another name: a process that still has the damaged file open takes the journal of a list
                # of the same name for that of its own, and deletes it. What a killed process or a transaction of the
                # damaged list left would be taken for the new list's.
                self._remove(NEW_LIST, *(name + "-journal" for name in (NEW_LIST, LIST)))
                self._make_list(NEW_LIST)
                os.replace(self.folder / NEW_LIST, self.folder / LIST)

    def _remove(self, *names: str) -> None:
        """Removes files of the folder, those that there are."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def get(self, name: str, fetch: Callable[[], bytes], source: str = "`fetch`") -> bytes:
        """Returns the bytes with a content hash: those of the cache or, if it does not have them, those of `fetch`.

        Args:
            name: The content hash, of the bytes as the one part.
            fetch: Returns the bytes.
            source: What `fetch` reads, for the message of an error.

        Raises:
            ValueError: if `fetch` returns bytes with another hash, which are not kept.
        """
        data = self._find(name)
        if data is not None:
            return data
        data = fetch()
        if (got := content_hash([data])) != name:
            raise ValueError(
                f"{source} must have the content hash {name}, as the index says, got {got}: the shard and the index do"
                " not belong together, or the shard is damaged. If the dataset was written anew, open it again"
            )
        if len(data) <= self.max_bytes:
            try:
                self._put(name, data)
            except CACHE_ERRORS as error:
                self._warn(error)
        return data

    @property
    def num_bytes(self) -> int:
        """Sum of the sizes of all files, in bytes."""
        with self._database() as database:
            return _total(database)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _find(self, name: str) -> bytes | None:
        """Returns the bytes of a file and notes that it was used; None if there is none or it is damaged."""
        try:
            with self._database() as database:
                try:
                    row = database.execute(
                        "UPDATE files SET used = ? WHERE name = ? RETURNING size", (time.time(), name)
                    ).fetchone()
                except sqlite3.OperationalError as error:
                    # To read, a full disk suffices.
                    self._warn(error)
                    row = database.execute("SELECT size FROM files WHERE name = ?", (name,)).fetchone()
            data = None if row is None else self._path(name).read_bytes()
        except FileNotFoundError:
            return None
        except CACHE_ERRORS as error:
            self._warn(error)
            return None
        return data if data is not None and len(data) == row[0] else None

    def _warn(self, error: Exception) -> None:
        if self.folder not in _failing:
            _failing.add(self.folder)
            logger.warning(
                "The cache in %s fails (%s): what it cannot keep is fetched every time. Free space on its disk, or"
                " give it another folder or a smaller size; a damaged list is made anew at the next start.",
                self.folder,
                error,
            )

    def _remove_unlisted(self, database: sqlite3.Connection) -> None:
        """Removes files that are not in the list, such as those that killed processes were writing."""
        # Files are written in transactions alone: within this one, no other process is writing.
        database.execute("BEGIN IMMEDIATE")
        now, last = int(time.time() / 60), database.execute("PRAGMA user_version").fetchone()[0]
        if 0 <= now - last < SEARCH_MINUTES:
            database.execute("ROLLBACK")
            return
        listed = {name for (name,) in database.execute("SELECT name FROM files")}
        for folder in self.folder.glob("??"):
            if folder.is_dir():
                for name in os.listdir(folder):
                    if name not in listed and name.startswith(folder.name) and OWN_FILE.fullmatch(name):
                        (folder / name).unlink(missing_ok=True)
        database.execute(f"PRAGMA user_version = {now}")
        database.execute("COMMIT")

    def _put(self, name: str, data: bytes) -> None:
        """Makes room for a file and writes it."""
        path = self._path(name)
        with self._database() as database:
            # In one transaction, so that all processes together keep to the limit.
            database.execute("BEGIN IMMEDIATE")
            _forget(database, database.execute("SELECT name, size FROM files WHERE name = ?", (name,)).fetchall())
            excess, old = _total(database) + len(data) - self.max_bytes, []
            if excess > 0:
                for row in database.execute("SELECT name, size FROM files ORDER BY used"):
                    old.append(row)
                    excess -= row[1]
                    if excess <= 0:
                        break
            for other, _ in old:
                self._path(other).unlink(missing_ok=True)
            _forget(database, old)
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name(f"{name}{PARTIAL}")
            try:
                partial.write_bytes(data)
                partial.replace(path)
                database.execute("INSERT INTO files VALUES (?, ?, ?)", (name, len(data), time.time()))
                database.execute("UPDATE total SET bytes = bytes + ?", (len(data),))
                database.execute("COMMIT")
            except BaseException:
                # While the transaction lasts: no other process is writing the same file.
                partial.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise

    @contextmanager
    def _database(self, name: str = LIST) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each use: none may be shared with forked processes or threads."""
        with closing(sqlite3.connect(self.folder / name, TIMEOUT, isolation_level=None)) as connection:
            # A list that a crash of the machine loses costs no more than fetching again.
            connection.execute("PRAGMA synchronous = OFF")
            yield connection


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps others that lock a folder waiting for a `with` block; where there are no locks, they do not wait."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _total(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT bytes FROM total").fetchone()[0])


def _forget(database: sqlite3.Connection, rows: list[tuple[str, int]]) -> None:
    """Takes files, given by name and size, off the list."""
    database.executemany("DELETE FROM files WHERE name = ?", [(name,) for name, _ in rows])
    database.execute("UPDATE total SET bytes = bytes - ?", (sum(size for _, size in rows),))
