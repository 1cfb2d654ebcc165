"""What a store knows of a sample beside its gradient: visits, losses, the user's columns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from logix_like.layout import DataId
from logix_like.store import GradientStore


class SampleColumns:
    """Looks a sample's last visit up by its id."""

    def __init__(self, store: GradientStore) -> None:
        self._rows = store.view("last")

    @cached_property
    def _places(self) -> Mapping[DataId, int]:
        return {data_id: row for row, data_id in enumerate(self._rows.data_id.tolist())}

    def of(self, data_id: DataId) -> dict[str, Any]:
        """Visits, loss at the last visit and the user's columns, as far as they are known."""
        row = self._places.get(data_id)
        if row is None:
            return {}
        loss, visits = float(self._rows.loss[row]), int(self._rows.visits[row])
        known: dict[str, Any] = {name: column[row] for name, column in self._metadata.items()}
        known |= {} if np.isnan(loss) else {"loss": loss}
        return known | {"visits": visits}

    @cached_property
    def _metadata(self) -> Mapping[str, Any]:
        return dict(self._rows.metadata)
