"""The checkpoint format of the published N2UQ code."""

from lightning_n2uq.interop.names import official_constants, official_names
from lightning_n2uq.interop.official import (
    ImportReport,
    load_official_checkpoint,
    official_state_dict,
    read_state_dict,
    save_official_checkpoint,
)

__all__ = [
    "ImportReport",
    "load_official_checkpoint",
    "official_constants",
    "official_names",
    "official_state_dict",
    "read_state_dict",
    "save_official_checkpoint",
]
