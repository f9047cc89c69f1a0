"""Profiles: every physical constant lives in a YAML file with its unit, its source and what it rests on.

This module finds the files, reads them without executing anything, and turns them into checked, frozen structs. What a
kind of profile holds is described beside the thing it describes (`simllm.hardware.accelerator`, ...), in terms of the
`Figure` classes below.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from simllm.errors import InputError, unknown_name
from simllm.hardware.figures import Figure, explain

__all__ = [
    "check_profile",
    "figures_of",
    "find_profile",
    "list_profiles",
    "load_profile",
    "load_profile_file",
    "parse_yaml",
    "profile_file",
    "profiles_dir",
    "read_yaml",
    "register_kind",
    "slugify",
]

Profile = TypeVar("Profile", bound=msgspec.Struct)
Checker = Callable[[Path, dict[str, Any]], list[str]]

# A profile is a few kilobytes and a few levels deep; anything else is not one and would only keep the parser busy.
_MAX_PROFILE_BYTES = 1 << 20
_MAX_DEPTH = 50


@lru_cache(maxsize=1)
def profiles_dir() -> Path:
    """The folder of the profiles: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "hardware_profiles", package.parent / "hardware_profiles"):
        if folder.is_dir():
            return folder
    raise InputError(f"no hardware_profiles folder in {package} or beside it; the installation is broken, reinstall it")


def slugify(name: str) -> str:
    """The file name a name stands for: lower case, everything but letters and digits is a dash.

    >>> slugify("NVIDIA A100 SXM"), slugify("AWS p5.48xlarge"), slugify("../etc/passwd")
    ('nvidia-a100-sxm', 'aws-p5-48xlarge', 'etc-passwd')
    """
    return re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")


@lru_cache(maxsize=16)
def list_profiles(folder: str) -> tuple[str, ...]:
    """The canonical names in one folder of the catalog, from the file names alone.

    >>> "dgx-h100" in list_profiles("systems")
    True
    """
    return tuple(sorted(path.stem for path in (profiles_dir() / folder).glob("*.yaml")))


@lru_cache(maxsize=16)
def _aliases(folder: str) -> dict[str, str]:
    # Only the alias block of each file is parsed: resolving an alias must not cost reading the whole catalog.
    found: dict[str, str] = {}
    for name in list_profiles(folder):
        text = (profiles_dir() / folder / f"{name}.yaml").read_text(encoding="utf-8")
        block = re.search(r"^aliases:[^\n]*(?:\n[ \-][^\n]*)*", text, re.MULTILINE)
        for alias in parse_yaml(block[0], folder)["aliases"] if block else ():
            found.setdefault(slugify(alias), name)
    return found


def find_profile(folder: str, name: str, what: str, hint: str = "") -> Path:
    """The file of a profile by its name or one of its aliases.

    Parameters
    ----------
    folder : str
        Folder of the catalog: ``"accelerators"``, ``"systems"``, ``"fabrics"``, ...
    name : str
        A name in any spelling: case, spaces and punctuation do not matter.
    what : str
        What the name stands for, for the error: ``"cluster"``.
    hint : str
        Appended to the error for an unknown name.

    Examples
    --------
    >>> find_profile("accelerators", "H100-SXM5-80GB", "accelerator").stem
    'h100-sxm'
    """
    slug = slugify(name)
    known = list_profiles(folder)
    if slug not in known:
        aliases = _aliases(folder)
        if slug not in aliases:
            raise unknown_name(what, name if len(name) <= 80 else f"{name[:77]}...", known, hint)
        slug = aliases[slug]
    return profiles_dir() / folder / f"{slug}.yaml"


def profile_file(folder: str, name_or_path: str, what: str, hint: str = "", beside: Path | None = None) -> Path:
    """The file meant by a name in the catalog or by the path of a file of one's own.

    A path ends in ``.yaml`` or ``.yml`` or names an existing file; written inside another profile it is relative to
    that profile's folder (`beside`).
    """
    path = Path(name_or_path)
    if beside is not None and not path.is_absolute():
        path = beside / path
    if path.suffix.lower() in (".yaml", ".yml"):
        return path
    if slugify(name_or_path) not in list_profiles(folder) and _is_file(path):
        return path
    return find_profile(folder, name_or_path, what, hint)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for a path is none
        return False


try:
    from yaml import CSafeLoader as _SafeLoader
except ImportError:  # PyYAML without libyaml: the same rules, slower
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]


class _Loader(_SafeLoader):
    """Plain values only: text, numbers, truth values, null, lists, mappings; a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is not plain text", key.start_mark)
            if key.value in seen:
                problem = f"the key `{key.value}` is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")} | {None}
_Loader.yaml_constructors = {tag: make for tag, make in _SafeLoader.yaml_constructors.items() if tag in _PLAIN}
# A date stays the text it is, and `1e9` is a number (YAML 1.1 wants `1.0e+9`).
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN]
    for first, resolvers in _SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_PROFILE_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes; a profile has at most {_MAX_PROFILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a profile written in YAML") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); a profile is a YAML text file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _refuse_deep(text: str, where: str) -> None:
    # libyaml's loader recurses in C and dies with the process on a stack of brackets; its events come one by one.
    # Few openers cannot nest deeply, and indentation alone cannot within the allowed size, so most files skip this.
    if sum(text.count(opener) for opener in ("[", "{", "- ", "-\t", "? ", "?\t")) <= 1000:
        return
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise InputError(f"{where}: nested more than {_MAX_DEPTH} levels deep; no profile is")


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A mapping from YAML text; `where` names the text in errors."""
    try:
        _refuse_deep(text, where)
        data = yaml.load(text, Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        tag = re.search(r"tag '([^']*)'", error.problem or "")
        if tag:
            shown = tag[1].replace("tag:yaml.org,2002:", "!!")
            problem = f"the tag {shown} is refused; a profile holds plain values only: text, numbers, lists, mappings"
        else:
            problem = error.problem or "not a plain value"
        raise InputError(f"{where}: {line}{problem}") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).replace('in "<unicode string>",', "in").split())
        raise InputError(f"{where} is not YAML: {problem}") from None
    except InputError:
        raise
    except (RecursionError, ValueError, KeyError) as error:  # `!!int x`, `!!bool x`
        raise InputError(f"{where} holds a value that is not what its tag says: {error}") from None
    if not isinstance(data, dict):
        held = "nothing" if data is None else f"a {type(data).__name__}"
        raise InputError(f"{where} holds {held}, not a mapping; write `kind: ...` and its keys")
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain content of one profile file; nothing in it is executed.

    Raises
    ------
    InputError
        If the file is missing, too large, not text, not YAML, carries a tag of any programming language, or writes a
        key twice.
    """
    return parse_yaml(_read_text(path), str(path))


@lru_cache(maxsize=256)
def _load(path: Path, _version: tuple[int, int], shape: Any) -> Any:
    return load_profile(read_yaml(path), shape, str(path))


def load_profile_file(path: Path, shape: type[Profile]) -> Profile:
    """One profile file as a checked, frozen struct; read again only when the file has changed."""
    try:
        stat = path.stat()
    except OSError:
        stat = None
    version = (stat.st_mtime_ns, stat.st_size) if stat else (0, 0)
    loaded: Profile = _load(path, version, shape)
    return loaded


def load_profile(data: dict[str, Any], shape: Any, where: str) -> Any:
    """Plain data as a checked, frozen struct of the type `shape`.

    Raises
    ------
    InputError
        For a missing or unknown key, a wrong type, unit or value: names the place, what was given and what is allowed.
    """
    try:
        return msgspec.convert(data, shape)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {explain(error, data, shape)}") from None


def figures_of(profile: msgspec.Struct, prefix: str = "") -> dict[str, Figure]:
    """Every figure of a profile by its key path, in the order of the profile: ``{"peak_flops.bf16": ...}``."""
    found: dict[str, Figure] = {}
    for key in profile.__struct_fields__:
        value = getattr(profile, key)
        if isinstance(value, Figure):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, msgspec.Struct):
            found.update(figures_of(value, f"{prefix}{key}."))
    return found


_KINDS: dict[str, Checker] = {}


def register_kind(kind: str, checker: Checker) -> None:
    """Let `check_profile` check profiles of one more kind.

    Parameters
    ----------
    kind : str
        What such a file says in its key ``kind``.
    checker : callable
        Takes the path and the plain content of the file; returns the problems, or raises `InputError` at the first.
    """
    _KINDS[kind] = checker


def check_profile(path: str | Path) -> list[str]:
    """The problems of one profile file of any kind; an empty list means that it can be used.

    Raises
    ------
    InputError
        If the file cannot be read at all.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        data = parse_yaml(text, str(path))
        kind = data.get("kind")
        if kind is None:
            return [f"{path}: the key `kind` is missing; it is one of {', '.join(sorted(_KINDS))}"]
        if not isinstance(kind, str) or kind not in _KINDS:
            return [f"{path}: {unknown_name('kind of profile', str(kind), _KINDS)}"]
        problems = _KINDS[kind](path, data)
    except InputError as error:
        return [str(error)]
    in_catalog = profiles_dir() in path.resolve().parents
    if in_catalog and data.get("name") != path.stem:
        problems.append(f"{path}: name is {data.get('name')!r}; in the catalog it is the file name, {path.stem!r}")
    return problems
