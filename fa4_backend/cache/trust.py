"""Whose files may be loaded as native code.

A shared library runs with all rights of the process that loads it, so what others can write is never loaded:

| what | owner | mode |
| --- | --- | --- |
| the cache folder, and every folder and file in it that is used | this user or root | no write bit for group or others |
| every folder above it | this user or root | the same, or sticky; or writable by the owner's private group alone |

* Root-owned folders serve all users: an administrator fills one, everybody loads from it, whether it can be written or not. Root itself
  trusts root alone, so a root process that kept a user's HOME loads nothing of that user's.
* Folders above count because whoever may rename in them can put another folder between the check and the load. In a sticky folder (/tmp)
  only an entry's owner may rename it. A private group has its owner's name and no other member (umask 002 makes many such folders).
* In a container's user namespace, folders above whose owner has no number there show as the overflow user. They belong to whoever made
  the container, who can read and write the process's memory anyhow: accepted above the cache folder, never inside it.
* Symbolic links are followed first, and what they lead to is judged. A link that leads out of the cache folder is refused.

Not looked at: access control lists beyond the mode's bits (whose mask shows in the group's bits), and who may become root.
"""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path

from fa4_backend import envs
from fa4_backend.cache.errors import UntrustedCacheError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_trusted(path: Path) -> Path:
    """`path` with symbolic links followed, after it and every folder above it were found to be trusted.

    Raises:
        UntrustedCacheError: another user owns one of them, or others may write it; see the module's table.
        OSError: one of them is missing or cannot be looked at.
    """
    return _walk(path, make=False)


def check_file(path: Path) -> Path:
    """The same for a file in a folder that was checked; the folders above are looked at again only where the file is a link.

    Raises:
        UntrustedCacheError: another user owns it, or others may write it.
        OSError: it is missing or cannot be looked at.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return check_trusted(path)
    _check(path, status, is_above=False)
    return path


def make_folder(folder: Path) -> Path:
    """Make `folder`, inside the cache folder, with those above that are missing; nobody but the owner may write them.

    Nothing is made below a folder that is not trusted.

    Raises:
        UntrustedCacheError: it, or one above it, is not trusted.
        OSError: it cannot be made.
    """
    return _walk(folder, make=True)


def _walk(path: Path, make: bool) -> Path:
    root, real = envs.cache_dir().resolve(), path.resolve()
    if not real.is_relative_to(root):
        raise UntrustedCacheError(f"{path} leads to {real}: expected a path inside the cache folder {root}. Remove the link.")
    for part in (*reversed(real.parents), real):
        if make and not part.exists():
            # Path.mkdir(parents=True) would give the folders above the umask's mode, which may let the group write.
            part.mkdir(mode=0o755, exist_ok=True)
        _check(part, part.stat(), is_above=not part.is_relative_to(root))
    return real


def _check(path: Path, status: os.stat_result, is_above: bool) -> None:
    owners = {0, os.geteuid()} | ({_overflow_user()} if is_above else set())
    writers = status.st_mode & _OTHERS_WRITE
    if is_above and (status.st_mode & stat.S_ISVTX or (writers == stat.S_IWGRP and _is_private_group(status))):
        writers = 0
    if status.st_uid in owners and not writers:
        return
    kind = "folder" if stat.S_ISDIR(status.st_mode) else "file"
    user = _user_name(os.geteuid())
    expected = "root" if os.geteuid() == 0 else f"{user} or root"
    raise UntrustedCacheError(
        f"{path}: expected a {kind} of {expected} that only its owner may write, got owner {_user_name(status.st_uid)}, "
        f"mode {stat.S_IMODE(status.st_mode):04o}. No native code is loaded from it. Set FA4_BACKEND_CACHE_DIR to a folder of your own"
        + (f", or, if its content is yours, run: chmod go-w '{path}'" if status.st_uid in owners else ".")
    )


def _is_private_group(status: os.stat_result) -> bool:
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return owner.pw_gid == group.gr_gid and owner.pw_name == group.gr_name and set(group.gr_mem) <= {owner.pw_name}


@cache
def _overflow_user() -> int | None:
    """The number that stands for owners without one in this user namespace; None where every owner has one."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except (OSError, ValueError):
        return None
    return None if any(int(first) <= overflow < int(first) + int(count) for first, _, count in ranges) else overflow


def _user_name(uid: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"
