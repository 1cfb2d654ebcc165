"""What the explorer's pages show."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from starlette.testclient import TestClient

import logix_like as logix
from logix_like.errors import QueryError
from logix_like.explorer.app import make_app
from logix_like.explorer.catalogue import SORTS, Catalogue, Wish
from logix_like.explorer.pages import ask_address, id_of, key_of
from logix_like.explorer.state import Explorer, Options
from logix_like.query.modes import MODES
from tests.explorer.stores import HOSTILE, TEXTS, loss_of_text, text_store

HERE = "http://127.0.0.1:8799"


@pytest.fixture(scope="module")
def explorer(texts: tuple[Path, nn.Module]) -> Explorer:
    path, model = texts
    explorer = Explorer(path, TEXTS, (model, loss_of_text))
    scored(explorer)
    return explorer


@pytest.fixture
def explorers() -> Iterator[Callable[..., Explorer]]:
    """Makes explorers that are closed at the end."""
    with ExitStack() as stack:

        def make(*arguments: Any) -> Explorer:
            explorer = Explorer(*arguments)
            stack.callback(explorer.close)
            return explorer

        yield make


@pytest.fixture
def client(explorer: Explorer) -> Iterator[TestClient]:
    with client_of(explorer) as client:
        yield client


def client_of(explorer: Explorer) -> TestClient:
    return TestClient(make_app(explorer, "t"), base_url=HERE, cookies={"logix-like-8799": "t"})


def scored(explorer: Explorer) -> Catalogue:
    catalogue = explorer.catalogue(patience=60)
    assert explorer.scoring is not None
    explorer.scoring.wait(60)
    assert catalogue.self_influence is not None
    return catalogue


def page(client: TestClient, address: str, **asked: object) -> str:
    answer = client.get(address, params={name: str(value) for name, value in asked.items()} or None)
    assert answer.status_code == 200, answer.text
    return answer.text


# Samples


def test_samples_are_listed_by_their_self_influence(explorer: Explorer, client: TestClient) -> None:
    run = logix.load(explorer.store.path)
    expected = run.compute_self_influence().highest(25)
    text = page(client, "/")
    places = [text.index(f">{key}</a>") for key in map(escape_of, expected.ids[0])]
    assert places == sorted(places)
    assert f"{expected.scores[0, 0].item():.4g}" in text
    assert "1 to 25 of 67" in text and "page=1" in text and "page=0" not in text


def escape_of(data_id: object) -> str:
    return str(data_id).replace("<", "&lt;").replace(">", "&gt;")


def test_the_last_page_ends_the_list(client: TestClient) -> None:
    text = page(client, "/", page=2)
    assert "51 to 67 of 67" in text and "page=3" not in text
    assert "51 to 67 of 67" in page(client, "/", page=99)


def test_samples_are_searched_and_filtered(client: TestClient) -> None:
    assert "1 to 1 of 1 (of 67)" in page(client, "/", find="TEXT-12")
    animals = sum(one["label"] == "animals" for one in TEXTS.values())
    assert f"of {animals} (of 67)" in page(client, "/", **{"is:class": "animals"})
    assert "No sample fits" in page(client, "/", find="nothing like this")
    early = page(client, "/", to=0)
    assert "No sample fits" in early  # every sample's last visit is later


@pytest.mark.parametrize("sort", SORTS)
def test_every_order_is_one(explorer: Explorer, sort: str) -> None:
    catalogue = scored(explorer)
    down, up = catalogue.chosen(Wish(sort=sort)), catalogue.chosen(Wish(sort=sort, ascending=True))
    assert sorted(down.tolist()) == list(range(67))
    assert up.tolist() == down[::-1].tolist()
    if sort == "loss":
        assert (np.diff(catalogue.numbers["loss"][down]) <= 0).all()


def test_nonsense_in_the_address_is_harmless(client: TestClient) -> None:
    for asked in ({"page": "x"}, {"sort": "<x>"}, {"from": "a"}, {"is:none": "x"}, {"page": "-5"}, {"from": "1" * 400}):
        assert "Samples" in page(client, "/", **asked)


def test_hostile_texts_are_text(client: TestClient) -> None:
    for name in HOSTILE:
        text = page(client, "/", find=name)
        assert text.count("<script") == 1 and 'onerror="document' not in unescape_tags(text)
    assert "(1,000,000 characters)" in page(client, "/", find="megabyte")
    assert "before\u2400after\u241b[31m" in page(client, "/", find="nul")
    assert "\\u202egnp.exe" in page(client, "/", find="direction")


def unescape_tags(text: str) -> str:
    """The attributes that a browser would see."""
    return " ".join(part.split(">")[0] for part in text.split("<")[1:])


# Questions


@pytest.mark.parametrize("data_id", ["text-3", 5, "<b>an id</b>"])
def test_a_sample_is_asked_about(explorer: Explorer, client: TestClient, data_id: str | int) -> None:
    store = explorer.store
    rows = store.view("last")
    place = rows.data_id.tolist().index(data_id)
    query = logix.QueryGradients((data_id,), rows.gradients[place : place + 1].float(), store.modules)
    expected = logix.load(store.path).compute_influence_all(query, k=3)
    text = page(client, ask_address(data_id) + "&k=3")
    for ranking in (expected.proponents(), expected.opponents()):
        for name, score in zip(ranking.ids[0], ranking.scores[0].tolist(), strict=True):
            assert escape_of(name) in text and f"{score:+.4g}" in text


def test_a_typed_query_is_answered(explorer: Explorer, client: TestClient, texts: tuple[Path, nn.Module]) -> None:
    text = page(client, "/ask", text="the cat and a dog")
    assert "What influenced “the cat and a dog”" in text
    run = logix.load(explorer.store.path, texts[1])
    with run.query(data_id=["q"]) as query:
        loss_of_text(texts[1], "the cat and a dog").backward()
    expected = run.compute_influence_all(query, k=3)
    for ranking in (expected.proponents(), expected.opponents()):
        for name, score in zip(ranking.ids[0], ranking.scores[0].tolist(), strict=True):
            assert escape_of(name) in text and f"{score:+.4g}" in text


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_answered_with_the_layers_shares(client: TestClient, mode: str) -> None:
    text = page(client, "/ask", sample="stext-3", mode=mode)
    assert f"{mode} score" in text and text.count("most from ") == (20 if MODES[mode].proportional else 0)


def test_options_and_filters_reach_the_engine(explorer: Explorer, client: TestClient) -> None:
    text = page(client, "/ask", sample="stext-3", mode="cosine", damping=0.5, preconditioner="kfac")
    assert "cosine score" in text and "damping 0.5" in text and "kfac (2 modules)" in text
    assert "damping auto" in page(client, "/ask", sample="stext-3", damping="auto")
    assert "damping 0.25 (absolute)" in page(client, "/ask", sample="stext-3", damping="absolute:.25")
    filtered = page(client, "/ask", sample="stext-3", **{"is:class": "kitchen"})
    assert "class kitchen" in filtered and "class animals" not in filtered
    assert "no sample fits the filter" in page(client, "/ask", sample="stext-3", to=0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sample": "snobody"}, "holds no valid row of a sample 'nobody'"),
        ({"sample": "x1"}, "is no key of a sample"),
        ({"sample": "ix"}, "is no key of a sample"),
        ({"sample": "stext-3", "mode": "dott"}, "unknown mode 'dott'"),
        ({"sample": "stext-3", "damping": "much"}, "it must be a number of at least 0"),
        ({"sample": "stext-3", "damping": "-1"}, "it must be a number of at least 0"),
        ({"sample": "stext-3", "damping": "nan"}, "it must be a number of at least 0"),
        ({"sample": "stext-3", "k": "many"}, "is 'many'; it must be a whole number"),
    ],
)
def test_what_cannot_be_asked_is_said(client: TestClient, asked: dict[str, str], message: str) -> None:
    answer = client.get("/ask", params=asked)
    assert answer.status_code == 200
    assert message in unescape(answer.text)
    if "damping" in asked:
        assert 'name="damping"' in answer.text and f'value="{asked["damping"]}"' in answer.text


def test_a_loss_that_fails_is_said(texts: tuple[Path, nn.Module], explorers: Callable[..., Explorer]) -> None:
    def broken(model: nn.Module, text: str) -> torch.Tensor:
        raise ZeroDivisionError("no")

    explorer = explorers(texts[0], None, (texts[1], broken))
    with pytest.raises(QueryError, match="failed on this text: ZeroDivisionError: no"):
        explorer.ask_text("x", Options(), Wish())
    with pytest.raises(QueryError, match="start with --model"):
        explorers(texts[0]).ask_text("x", Options(), Wish())


def test_keys_tell_numbers_from_texts() -> None:
    for data_id in (3, "3", "", "i3", -1):
        assert id_of(key_of(data_id)) == data_id


# Health


def test_health_tells_how_the_run_is_doing(explorer: Explorer, client: TestClient) -> None:
    text = page(client, "/health")
    for words in ("201", "rows in the statistics", "100%", "0 rows", "closed", "linear", "Not checked since"):
        assert words in text
    client.post("/verify", headers={"origin": HERE})
    assert explorer.verification is not None
    explorer.verification.wait(60)
    assert "files were checked, none is damaged" in page(client, "/health")


def test_damage_is_found_and_named(tmp_path: Path, explorers: Callable[..., Explorer]) -> None:
    path, _ = text_store(tmp_path)
    chunk = next(file for file in path.glob("writers/0-1/**/gradients/c.*") if file.is_file())
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    explorer = explorers(path)
    with client_of(explorer) as client:
        explorer.verify()
        assert explorer.verification is not None
        explorer.verification.wait(60)
        assert str(chunk) in page(client, "/health")


def test_a_growing_store_is_followed(tmp_path: Path, explorers: Callable[..., Explorer]) -> None:
    model = nn.Linear(4, 2)
    run = logix.init("live", model, root=tmp_path, verbose=False)

    def log(first: int) -> None:
        with run(data_id=range(first, first + 5)):
            model(torch.randn(5, 4)).square().sum().backward()
        run.commit()

    log(0)
    explorer = explorers(run.path)
    with client_of(explorer) as client:
        assert "1 to 5 of 5" in page(client, "/")
        assert "A writer is open" in page(client, "/health")
        log(5)
        time.sleep(0.6)
        told = client.get("/follow.json").json()
        assert (told["rows"], told["writing"]) == (10, True)
        assert told["rate"] > 0
        explorer.catalogue(patience=60)
        assert "1 to 10 of 10" in page(client, "/")
    run.finalize()


def test_a_store_without_rows_is_no_error(tmp_path: Path, explorers: Callable[..., Explorer]) -> None:
    run = logix.init("empty", nn.Linear(2, 2), root=tmp_path, verbose=False)
    run.finalize()
    with client_of(explorers(run.path)) as client:
        assert "0 to 0 of 0" in page(client, "/")
        page(client, "/ask")
        assert "none" in page(client, "/health")


def test_the_first_rows_are_shown_while_ids_are_read(
    texts: tuple[Path, nn.Module], explorers: Callable[..., Explorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = explorers(texts[0])
    explorer.catalogue(patience=60)
    monkeypatch.setattr(type(explorer._listing), "running", property(lambda self: True))
    first = explorer.catalogue()
    assert not first.complete
    with client_of(explorer) as client:
        text = page(client, "/")
    assert "The ids of all rows are being read" in text and "data-waiting" in text


def test_pictures_are_shown(pictures: tuple[Path, nn.Module], explorers: Callable[..., Explorer]) -> None:
    from tests.explorer.stores import picture_of

    explorer = explorers(pictures[0], picture_of)
    explorer.catalogue(patience=60)
    with client_of(explorer) as client:
        text = page(client, "/")
        assert text.count("background-image:url(data:image/png;base64,") == 25
        answer = page(client, "/ask", sample="i7")
        assert 'aria-label="picture of sample 7"' in answer and "digit 7" in answer


def test_closing_leaves_nothing_running(texts: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = vars(Catalogue)["ids"].func

    def ids(self: Catalogue) -> list[Any]:
        time.sleep(0.2)  # closed while it lists, which the scoring would follow
        listed: list[Any] = slow(self)
        return listed

    monkeypatch.setattr(Catalogue, "ids", property(ids))
    explorer = Explorer(texts[0])
    explorer.verify()
    explorer.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "logix-explorer"]
    assert explorer.scoring is None or not explorer.scoring.running
