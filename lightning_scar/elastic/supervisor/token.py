"""The token of jobs on several nodes: from the environment, else from a file that node 0 makes."""

import os
import secrets
from pathlib import Path

VARIABLE = "LIGHTNING_SCAR_TOKEN"
FILE = "~/.lightning-scar-token"
_SHORTEST = 16


class TokenError(Exception):
    """There is no token, or not one that could be trusted."""


def find_token(make: bool) -> bytes:
    """Return the token, from the environment or the file in the user's home directory.

    Args:
        make: Whether to make the file if there is neither.

    Raises:
        TokenError: If there is neither, or somebody else could know the token.

    """
    if text := os.environ.get(VARIABLE):
        return _checked(text, VARIABLE)
    path = Path(FILE).expanduser()
    try:
        if make and not path.exists():
            _make(path)
        status = path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise TokenError(
                f"the token in {path} is not its owner's and yours alone (mode {status.st_mode & 0o777:o}): others may "
                f"know it. Delete the file on all nodes; node 0 makes another"
            )
        return _checked(path.read_text(), str(path))
    except FileNotFoundError:
        raise TokenError(
            f"a job on several nodes needs a token: give this node a copy of {FILE} of node 0 (chmod 600), or all "
            f"nodes the same {VARIABLE}"
        ) from None
    except (OSError, ValueError) as error:
        raise TokenError(f"{path} cannot be used: {error}; set {VARIABLE} instead, the same on all nodes") from None


def _checked(text: str, where: str) -> bytes:
    if len(text.strip()) < _SHORTEST:
        raise TokenError(f"the token in {where} is shorter than {_SHORTEST} characters; make one: openssl rand -hex 32")
    return text.strip().encode()


def _make(path: Path) -> None:
    """Make the file at once and whole: other nodes may share the directory, and other jobs may make it, too."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
