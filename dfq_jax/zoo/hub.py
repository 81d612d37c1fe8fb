"""Weights on the Hugging Face hub: ``hf:ORG/REPO[/FILE][@REVISION]`` to a file on this machine."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

__all__ = ["Reference", "local_file"]

_PREFIX = "hf:"
_FORM = "hf:ORG/REPO[/FILE][@REVISION], such as hf:timm/resnet18.tv_in1k"
_PART = r"[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(rf"({_PART}/{_PART})(?:/([^@]+))?(?:@(.+))?", re.ASCII)
# Kinds of files of weights, the first of which a repository has is taken.
_KINDS = ((".safetensors",), (".msgpack", ".npz"), (".pth", ".pt", ".th", ".bin"))


class Reference(NamedTuple):
    """A file on the hub.

    Attributes:
      repo: ``ORG/REPO``.
      file: path of the file in it; None for the only file of weights.
      revision: branch, tag or commit; None for the default branch.
    """

    repo: str
    file: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Of ``hf:ORG/REPO[/FILE][@REVISION]``.

        Raises:
          ValueError: if it is of another form.
        """
        match = _REFERENCE.fullmatch(text.removeprefix(_PREFIX))
        if match is None or not text.startswith(_PREFIX) or {"", ".", ".."} & set((match[2] or "x").split("/")):
            raise ValueError(f"path: {text!r} is no reference to the hub; expected {_FORM}")
        return cls(*match.groups())


def local_file(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The file itself, or the downloaded one of a reference to the hub, from the hub's cache where it is there.

    The environment variables of huggingface_hub hold: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``.

    Args:
      path: a file, or ``hf:ORG/REPO[/FILE][@REVISION]``; where no file is named, the repository's only safetensors
        file or, without one, its only file of weights.

    Raises:
      ValueError: if a reference is malformed, does not exist, cannot be downloaded or is not unique.
      ImportError: for a reference without huggingface_hub.
    """
    if not (isinstance(path, str) and path.startswith(_PREFIX)):
        return path
    repo, file, revision = Reference.parse(path)
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"path: {path} needs huggingface_hub: pip install 'dfq_jax[hf]'") from error
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        if file is None:
            file = _only_file(path, api.list_repo_files(repo, revision=revision))
        return api.hf_hub_download(repo, file, revision=revision)
    except ValueError as error:  # ours, and the hub's own about names
        raise error if str(error).startswith("path:") else _failed(path, error) from error
    except Exception as error:  # the hub's errors, those of its HTTP library, and of the disk
        raise _failed(path, error) from error


def _only_file(path: str, names: list[str]) -> str:
    for suffixes in _KINDS:
        found = sorted(name for name in names if name.lower().endswith(suffixes))
        if len(found) == 1:
            return found[0]
        if found:
            more = ", ..." if len(found) > 10 else ""
            raise ValueError(f"path: {path} holds several files of weights; name one: {', '.join(found[:10])}{more}")
    kinds = ", ".join(suffix for suffixes in _KINDS for suffix in suffixes)
    raise ValueError(f"path: {path} holds no file of weights ({kinds})")


def _failed(path: str, error: Any) -> ValueError:
    reason = " ".join(str(error).split())[:400] or "no reason given"
    return ValueError(
        f"path: cannot get {path} from the hub ({type(error).__name__}: {reason}). "
        "Check the name, the revision, access to it and the network; a file that was downloaded before needs none "
        "if it is named: hf:ORG/REPO/FILE"
    )
