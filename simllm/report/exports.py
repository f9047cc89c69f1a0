"""What a person must know beside an exported file."""

from __future__ import annotations

from simllm.export import Exported

__all__ = ["export_notes"]


def export_notes(exported: Exported, file: str | None) -> str:
    """How to start it, what the file cannot hold, and what else is to be known.

    Parameters
    ----------
    exported : Exported
    file : str or None
        Where it was written.
    """
    lines = [f"start it with: {exported.launch.replace('FILE', file) if file else exported.launch}"]
    lines += [f"not in the file: {one.option} {one.value}, set in {one.where}" for one in exported.elsewhere]
    lines += [f"note: {note}" for note in exported.notes]
    return "\n".join(lines) + "\n"
