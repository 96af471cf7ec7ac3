"""Files that are replaced as a whole: whatever fails, the old or the new contents are there."""

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of a file's contents, in one step where its folder can be written to.

    Links stay and their target is replaced; the file keeps its mode and, where that is allowed, its owner.
    Raises OSError, and RuntimeError for links in a circle; the old contents stay then.
    """
    target = path.resolve()
    status = target.stat() if target.exists() else None
    if status and not os.access(target, os.W_OK):  # its folder would let it be replaced all the same
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    beside = target.with_name(f".{secrets.token_hex(8)}.new")  # no file of the user's
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, status.st_mode & 0o777 if status else 0o666)
    except OSError as error:
        if status and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            target.write_bytes(data)  # a file that can be written, in a folder that cannot
            return
        raise
    try:
        with os.fdopen(handle, "wb") as file:
            if status:
                with suppress(PermissionError):
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), status.st_mode & 0o7777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
