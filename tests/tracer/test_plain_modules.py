"""Torch modules that are not of transformers: found by structure, or named by the user."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from placer.errors import PlacerError, UsageError
from placer.tracer import capture

E, K, H = 6, 2, 8


class Gate(nn.Module):
    """Returns ids and weights, as the gates of DeepSeek's own code do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        scores = (hidden.reshape(-1, H) @ self.weight.T).softmax(dim=-1)
        weights, ids = scores.topk(K, dim=-1)
        return ids, weights, None


class ListedExperts(nn.Module):
    """A gate beside a list of experts that are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))

    def forward(self, hidden: Tensor) -> Tensor:
        ids, weights, _ = self.gate(hidden)
        rows = hidden.reshape(-1, H)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, column = torch.where(ids == e)
            out[token] += expert(rows[token]) * weights[token, column, None]
        return out.view_as(hidden)


class StackedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, H, H))

    def forward(self, hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        picked = torch.einsum("nh,nkhi->nki", hidden, self.up[ids])
        out = (picked * weights[..., None]).sum(dim=1)
        ids.fill_(0)  # a kernel may work in place
        return out


class InPlace(nn.Module):
    """Experts that take ids by name and overwrite them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.experts = StackedExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        ids, weights, _ = self.gate(hidden)
        return self.experts(hidden.reshape(-1, H), ids=ids, weights=weights).view_as(hidden)


class Fused(nn.Module):
    """A kernel that reads the router's weight and calls no module."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.experts = StackedExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, H)
        weights, ids = (rows @ self.gate.weight.T).softmax(dim=-1).topk(K, dim=-1)
        picked = torch.einsum("nh,nkhi->nki", rows, self.experts.up[ids])
        return (picked * weights[..., None]).sum(dim=1).view_as(hidden)


class Hidden(nn.Module):
    """Routes in a way that nothing outside can see."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = StackedExperts()
        self.table = nn.Parameter(torch.randn(H, E))

    def forward(self, hidden: Tensor) -> Tensor:
        weights, ids = (hidden.reshape(-1, H) @ self.table).softmax(dim=-1).topk(K, dim=-1)
        picked = torch.einsum("nh,nkhi->nki", hidden.reshape(-1, H), self.experts.up[ids])
        return (picked * weights[..., None]).sum(dim=1).view_as(hidden)


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden) + hidden
        return hidden


def expected(model: Layers, hidden: Tensor) -> list[np.ndarray]:
    """Ids of each layer, from the gate's formula."""
    found = []
    for layer in model.layers:
        if hasattr(layer, "gate"):
            rows = hidden.reshape(-1, H) @ layer.gate.weight.T
            found.append(rows.topk(K, dim=-1).indices.numpy())
        hidden = layer(hidden) + hidden
    return found


@pytest.mark.parametrize("kind", [ListedExperts, InPlace, Fused])
def test_found_by_structure(kind: Any) -> None:
    torch.manual_seed(0)
    model = Layers(kind(), nn.Linear(H, H), kind()).eval()
    batches = [torch.randn(2, 3, H) for _ in range(3)]
    with torch.no_grad():
        plain = [model(batch) for batch in batches]
        ids = [expected(model, batch) for batch in batches]
    with capture(model, weights=True) as tracer, torch.no_grad():
        traced = [model(batch) for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    trace = tracer.trace()
    assert trace.layer_ids.tolist() == [0, 2]
    for i in range(2):
        assert np.array_equal(trace.experts[:, i], np.concatenate([found[i] for found in ids]))
    assert trace.request.tolist() == [r for r in range(6) for _ in range(3)]
    assert trace.position.tolist() == [0, 1, 2] * 6
    assert bool(tracer.notes) == (kind is Fused)


class Scores(nn.Module):
    """Returns a score for every expert; some tokens are for one expert only."""

    top_k = K

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, H)[:, :E].sigmoid()
        weights, ids = rows.topk(K, dim=-1)
        weights[::3, 1] = 0
        return torch.zeros_like(rows).scatter(1, ids, weights)


class Dense(nn.Module):
    """Every expert computes every token, scaled by its score."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Scores()
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))

    def forward(self, hidden: Tensor) -> Tensor:
        scores = self.router(hidden).view(*hidden.shape[:-1], E)
        every = torch.stack([expert(hidden) for expert in self.experts], dim=-1)
        return (every * scores[..., None, :]).sum(dim=-1)


def test_an_expert_with_score_zero_is_not_used() -> None:
    torch.manual_seed(0)
    model = Layers(Dense())
    batch = torch.randn(2, 3, H)
    with capture(model, weights=True) as tracer, torch.no_grad():
        model(batch)
    trace = tracer.trace()
    ids = batch.reshape(-1, H)[:, :E].topk(K, dim=-1).indices
    ids[::3, 1] = -1
    assert trace.experts[:, 0].tolist() == ids.tolist()
    assert trace.weights is not None
    assert ((trace.weights > 0) == (trace.experts >= 0)).all()


def test_ids_past_the_last_expert_are_not_used() -> None:
    class Past(Gate):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
            ids, weights, _ = super().forward(hidden)
            return torch.where(ids == 0, E + 1, ids), weights, None

    torch.manual_seed(0)
    gate = Past()
    batch = torch.randn(4, 3, H)
    with torch.no_grad():
        ids = (batch.reshape(-1, H) @ gate.weight.T).topk(K, dim=-1).indices.numpy()
    with capture(gate, experts=[""], num_experts=E, weights=True) as tracer, torch.no_grad():
        gate(batch)
    trace = tracer.trace()
    expected = np.where(ids == 0, -1, ids)
    assert (expected < 0).any()
    assert np.array_equal(np.sort(trace.experts[:, 0], axis=1), np.sort(expected, axis=1))
    assert (trace.experts[:, 0, 0] >= 0).all()  # what is used comes first
    assert trace.weights is not None
    assert ((trace.weights > 0) == (trace.experts >= 0)).all()


def test_what_cannot_be_seen_is_said() -> None:
    model = Layers(Hidden(), Hidden())
    with pytest.raises(PlacerError, match="none of the modules") as caught, capture(model):
        model(torch.randn(2, 3, H))
    assert "experts=" in caught.value.hint


def test_a_layer_that_cannot_be_seen_beside_others_is_said() -> None:
    model = Layers(ListedExperts(), ListedExperts())

    def blind(hidden: Tensor) -> Tensor:
        return hidden

    model.layers[1].forward = blind
    with pytest.raises(PlacerError, match=r"layers\.1 routes tokens"), capture(model):
        model(torch.randn(2, 3, H))


@pytest.mark.parametrize("by", ["path", "module", "function"])
def test_named_by_the_user(by: str) -> None:
    torch.manual_seed(0)
    model = Layers(Fused(), ListedExperts(), ListedExperts())
    paths = ["layers.1.gate", "layers.2.gate"]
    named: Any = {
        "path": paths,
        "module": [model.get_submodule(path) for path in paths],
        "function": {path: lambda args, kwargs, output: output[:2] for path in paths},
    }[by]
    batch = torch.randn(2, 3, H)
    with torch.no_grad():
        ids = expected(model, batch)
    with capture(model, experts=named, num_experts=E, weights=True) as tracer, torch.no_grad():
        model(batch)
        model(batch)
    trace = tracer.trace()
    assert trace.layer_ids.tolist() == [1, 2]
    assert trace.num_experts == E
    for i in range(2):
        assert trace.experts[:6, i].tolist() == ids[i + 1].tolist()
    assert trace.requests().tolist() == [0, 1, 2, 3]


def test_flat_tokens_are_one_request_unless_told() -> None:
    model = Layers(ListedExperts(), ListedExperts())
    with capture(model) as tracer, torch.no_grad():
        model(torch.randn(5, H))
        tracer.batch(requests=[[7, 7, 8]], positions=[[0, 1, 0]], valid=[[True, True, False]])
        model(torch.randn(3, H))
    trace = tracer.trace()
    assert trace.request.tolist() == [0] * 5 + [7, 7]
    assert trace.position.tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_wrong_names_are_refused() -> None:
    model = Layers(ListedExperts())
    with pytest.raises(UsageError, match="num_experts"):
        capture(model, experts=["layers.0.gate"])
    with pytest.raises(UsageError, match=r"layers\.9"):
        capture(model, experts=["layers.9"], num_experts=E)
    with pytest.raises(UsageError, match="not part of the model"):
        capture(model, experts=[Gate()], num_experts=E)
    with (
        pytest.raises(PlacerError, match="holds no expert ids"),
        capture(model, experts=["layers.0.experts.0"], num_experts=E),
    ):
        model(torch.randn(9, H))
    with (
        pytest.raises(UsageError, match="no experts that were called"),
        capture(model, routers="nowhere"),
    ):
        model(torch.randn(9, H))


def test_two_sets_of_experts_must_be_chosen_from() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = Layers(ListedExperts(), ListedExperts())
            self.right = Layers(ListedExperts(), ListedExperts())

        def forward(self, hidden: Tensor) -> Tensor:
            return self.right(self.left(hidden))

    model = Two()
    with pytest.raises(UsageError, match="2 sets of experts") as caught, capture(model):
        model(torch.randn(2, 3, H))
    assert "routers=" in caught.value.hint
    with capture(model, routers="^right") as tracer, torch.no_grad():
        model(torch.randn(2, 3, H))
    assert tracer.trace().num_tokens == 6
    assert tracer.layout is not None
    assert all(site.name.startswith("right") for site in tracer.layout.sites)


def test_a_layer_that_is_called_twice_is_refused() -> None:
    shared = ListedExperts()
    model = Layers(shared)

    def twice(hidden: Tensor) -> Tensor:
        return shared(shared(hidden))

    model.forward = twice
    with pytest.raises(PlacerError, match="called 2 times"), capture(model):
        model(torch.randn(2, 3, H))


def test_a_layer_that_gets_some_of_the_tokens_is_refused() -> None:
    class Half(Layers):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden[:, :2])

    with pytest.raises(PlacerError, match="4 of the 6 tokens"), capture(Half(InPlace())) as t:
        t._model(torch.randn(2, 3, H))


def test_missing_weights_are_refused_only_when_wanted() -> None:
    class Ids(Gate):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden)[0]

    model = Layers(Ids())
    options: Any = {"experts": ["layers.0"], "num_experts": E}
    model.layers[0].register_forward_hook(lambda module, args, output: None)

    class Wrap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model.layers

        def forward(self, hidden: Tensor) -> Tensor:
            return self.layers[0](hidden)

    wrapped = Wrap()
    with capture(wrapped, **options) as tracer:
        wrapped(torch.randn(4, H))
    assert tracer.trace().num_tokens == 4
    with pytest.raises(UsageError, match="gate weights"), capture(wrapped, weights=True, **options):
        wrapped(torch.randn(4, H))
