"""``simllm hardware``: the profiles that every physical constant comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from simllm.cli.options import Json, Output, Overwrite
from simllm.cli.output import check_output, emit
from simllm.errors import InputError, unknown_name

__all__ = ["COMMANDS", "check", "list_hardware", "show"]

#: Kinds of profiles and their folders; a name that is in several is looked for in this order.
_FOLDERS = {
    "system": "systems",
    "accelerator": "accelerators",
    "fabric": "fabrics",
    "link": "links",
    "stack": "stacks",
    "kernels": "kernels",
}
_KIND_HELP = "Only one kind: system, accelerator, fabric, link, stack or kernels."


def list_hardware(
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help=_KIND_HELP)] = None,
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """List systems, accelerators, fabrics, links and software stacks.

    \b
    Example:
      simllm hardware list --kind system
    """
    from simllm.hardware import list_profiles, load_accelerator
    from simllm.hardware.profiles import find_profile, load_profile_file
    from simllm.hardware.system import SystemProfile
    from simllm.report.hardware import catalog_dict, catalog_report

    check_output(output, overwrite=overwrite)
    wanted = _kinds(kind)
    systems = [
        load_profile_file(find_profile("systems", name, "system"), SystemProfile)
        for name in (list_profiles("systems") if "system" in wanted else ())
    ]
    accelerators = [
        load_accelerator(name) for name in (list_profiles("accelerators") if "accelerator" in wanted else ())
    ]
    names = {_FOLDERS[k]: list_profiles(_FOLDERS[k]) for k in wanted if k not in ("system", "accelerator")}
    emit(
        lambda: catalog_dict(accelerators, systems, names),
        lambda: catalog_report(accelerators, systems, names),
        as_json,
        output,
    )


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name or alias of the catalog, or a YAML file.")],
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help=_KIND_HELP)] = None,
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Show every figure of a profile with its unit, its source and what it rests on.

    \b
    Examples:
      simllm hardware show h100-sxm
      simllm hardware show h100-sxm --kind kernels
    """
    from simllm.hardware.profiles import read_yaml
    from simllm.report.hardware import profile_dict, profile_report

    check_output(output, overwrite=overwrite)
    path = _find(name, _kinds(kind))
    problems = _check_profile(path)
    if problems:
        raise InputError("; ".join(problems))
    data = read_yaml(path)
    emit(lambda: profile_dict(data), lambda: profile_report(data), as_json, output)


def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A profile written in YAML.")],
    as_json: Json = False,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Check a profile of your own; exit status 1 when something is wrong with it.

    \b
    Example:
      simllm hardware check my-cluster.yaml
    """
    from simllm.report.hardware import check_report

    check_output(output, overwrite=overwrite)
    problems = _check_profile(file)
    emit(
        lambda: {"file": file, "ok": not problems, "problems": problems},
        lambda: check_report(file, problems),
        as_json,
        output,
    )
    if problems:
        raise typer.Exit(1)


def _check_profile(path: str | Path) -> list[str]:
    # Kernel profiles are a kind of their own once the module that reads them is there.
    from simllm.hardware import check_profile
    from simllm.kernels import schema  # noqa: F401

    return check_profile(path)


def _kinds(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return tuple(_FOLDERS)
    singular = {folder: name for name, folder in _FOLDERS.items()}
    if kind not in _FOLDERS and kind not in singular:
        raise unknown_name("kind of profile", kind, _FOLDERS)
    return (singular.get(kind, kind),)


def _find(name: str, kinds: tuple[str, ...]) -> Path:
    """The file of a profile: a path that was given, or the first kind that knows the name."""
    from simllm.hardware import list_profiles
    from simllm.hardware.profiles import find_profile

    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return Path(name)
    for kind in kinds:
        try:
            return find_profile(_FOLDERS[kind], name, kind)
        except InputError:
            continue
    what = kinds[0] if len(kinds) == 1 else "profile"
    known = {known for kind in kinds for known in list_profiles(_FOLDERS[kind])}
    raise unknown_name(what, name, known, "(simllm hardware list names them; a YAML file works too)")


COMMANDS: dict[str, Callable[..., Any]] = {"list": list_hardware, "show": show, "check": check}
