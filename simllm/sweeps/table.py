"""Rows to one table: the same columns, order and types whoever computed them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simllm.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FORMATS", "check_format", "frame", "table_bytes"]

FORMATS = (".parquet", ".csv")

_TYPES: tuple[tuple[type, str], ...] = ((bool, "boolean"), (int, "Int64"), (float, "Float64"), (str, "string"))


def check_format(output: Path) -> None:
    """Refuse a name whose format is not known or cannot be written here."""
    if output.suffix.lower() not in FORMATS:
        raise InputError(f"{output}: the name must end in {' or '.join(FORMATS)}")
    if output.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise InputError("Parquet needs pyarrow; install simllm[sweep], or write a .csv") from None


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a pandas DataFrame; what a row does not have is missing, whole numbers stay whole.

    Parameters
    ----------
    rows : sequence of dict
        In the order of the cells.
    """
    import pandas as pd

    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        dtype: Any = next((dtype for kind, dtype in _TYPES if kinds == {kind}), "string" if not kinds else "Float64")
        columns[name] = pd.array(values, dtype=dtype)
    return pd.DataFrame(columns)


def table_bytes(table: pd.DataFrame, output: Path) -> bytes:
    """The content of the output file."""
    if output.suffix.lower() == ".csv":
        return table.to_csv(index=False).encode()
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
