"""Labels of requests: the domain or workload that a request belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import BadFileError


def labels_by_request(
    labels: Mapping[int, str] | Sequence[str | None] | NDArray[Any],
    request_ids: NDArray[np.int64],
    where: str,
) -> dict[int, str]:
    """Request id -> label, of those requests that have one.

    None and the empty string mean: no label.

    Args:
        labels: a mapping by request id; or a sequence, indexed by request id when its length is
            the largest id + 1, else by rank among the sorted ids when it is as long as these.
        request_ids: [R] distinct ids, increasing.
        where: name of the source, for messages.
    """
    known = request_ids.tolist()
    if isinstance(labels, Mapping):
        unknown = sorted(set(labels) - set(known))
        if unknown:
            raise BadFileError(
                f"{where}: a label is given for request {unknown[0]}, which has no tokens"
            )
        by_id: dict[int, Any] = dict(labels)
    else:
        sequence = _as_list(labels, where)
        largest = known[-1] if known else -1
        if len(sequence) == largest + 1:
            by_id = {request: sequence[request] for request in known}
        elif len(sequence) == len(known):
            by_id = dict(zip(known, sequence, strict=True))
        else:
            raise BadFileError(
                f"{where}: request_label has {len(sequence)} labels, expected {largest + 1} "
                f"(one for each id up to the largest) or {len(known)} (one for each request)"
            )
    found: dict[int, str] = {}
    for request in known:
        label = by_id.get(request)
        if label is None or label == "":
            continue
        if not isinstance(label, str):
            raise BadFileError(
                f"{where}: the label of request {request} is {label!r}, expected a string"
            )
        found[request] = str(label)
    return found


def labels_of_pairs(
    requests: NDArray[np.int64], labels: Sequence[str | None], where: str
) -> dict[int, str]:
    """Request id -> label from pairs; a request with two different labels is refused."""
    found: dict[int, str] = {}
    for request, label in zip(requests.tolist(), labels, strict=True):
        if label:
            add_label(found, request, label, where)
    return found


def add_label(found: dict[int, str], request: int, label: str, where: str) -> None:
    """Put a label into `found`, unless that request has another one already."""
    if found.setdefault(request, label) != label:
        raise BadFileError(
            f"{where}: request {request} is labelled both {found[request]!r} and {label!r}",
            "give each request its own id",
        )


def _as_list(labels: Sequence[str | None] | NDArray[Any], where: str) -> list[Any]:
    if isinstance(labels, np.ndarray):
        if labels.dtype.kind != "U" or labels.ndim != 1:
            raise BadFileError(
                f"{where}: request_label is {labels.dtype} of shape {labels.shape}, "
                "expected one string for each request"
            )
        return list(labels.tolist())
    if isinstance(labels, str):
        raise BadFileError(f"{where}: labels is one string, expected one for each request")
    return list(labels)
