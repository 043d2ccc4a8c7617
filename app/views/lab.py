"""Patch a pair of prompts: type two, see their tokens side by side, and which layer and position carry the difference.
Addressed by ?run=<id> of such a run, or by what is typed (clean, corrupted, right, wrong, model, what...) while that is
short."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import streamlit as st

from app import widgets
from circuits import position_patching
from circuits.position_patching import Tokens
from workbench import canvas, plots, pretrained, registry, runs, texts
from workbench.errors import UserError
from workbench.runs import Run

NAME = "position-patching"
LONG = 2000  # characters of an address; longer prompts are found again by their run alone
ACROSS, BLOCKS = 14, 5  # tokens of a row, at most, and rows that are shown
FIELDS = {"what": "what is patched", "direction": "direction", "metric": "metric"}
SIGNS = str.maketrans({"\n": "↵", "\t": "⇥"})


# ---- what is typed, and the address ----


def key(name: str) -> str:
    return f"lab {name}"


def typed(name: str) -> Any:
    return st.session_state[key(name)]


def defaults() -> dict[str, Any]:
    chosen = registry.get_analysis(NAME)
    return {"model": chosen.model, **{name: one.default for name, one in chosen.parameters.items()}}


def addressed() -> Run | None:
    """The run of the address, if it is one of these."""
    with suppress(UserError, *widgets.BROKEN):
        run = runs.get_run(st.query_params.get("run", ""))
        fields(run)  # breaks where the record was changed by hand
        if run.record["key"]["analysis"] == NAME:
            return run
    return None


def fill() -> None:
    """Put what the address says into the fields: when they are new, and when it names another run than before."""
    asked = st.query_params.get("run", "")
    new = any(key(name) not in st.session_state for name in defaults())
    if not new and asked in ("", st.session_state.get("lab run")):
        return
    run = addressed()
    given = fields(run) if run is not None else {k: v for k, v in st.query_params.items() if len(v) <= LONG}
    for name, value in (defaults() | accepted(given)).items():
        st.session_state[key(name)] = value


def fields(run: Run) -> dict[str, Any]:
    return {"model": run.record["model_name"], **run.record["key"]["parameters"]}


def accepted(given: dict[str, Any]) -> dict[str, Any]:
    """Of what an address or a record says, what the analysis takes."""
    found = {"model": str(given["model"])} if "model" in given else {}
    for name in given.keys() - found.keys():
        with suppress(UserError):
            found |= {name: registry.bind(registry.get_analysis(NAME), {name: given[name]})[name]}
    return found


def keep(on: dict[str, Any], run: Run | None) -> None:
    """Write the address: the run, or else what differs from the defaults, if that is short."""
    given = {name: str(value) for name, value in on.items() if value != defaults()[name]}
    short = sum(map(len, given.values())) <= LONG
    address = {"run": run.id} if run is not None else given if short else {}
    st.session_state["lab run"] = address.get("run", "")
    if st.query_params.to_dict() != address:
        st.query_params.from_dict(address)


# ---- the form ----


@st.cache_resource(max_entries=2, show_spinner=False)
def tokenizer(model: str, fingerprint: str) -> Tokens | None:
    return position_patching.tokenizer_of(model)


def reader(model: str) -> Tokens | None:
    """The tokenizer alone, which a page can wait for; None where the weights are yet to be fetched."""
    found = None if model.startswith(texts.PATHS) else pretrained.fingerprint(model)
    return None if found is None else tokenizer(model, found)


def take() -> None:
    """Of the task that is chosen, a pair, into the fields."""
    st.session_state.pop("lab refused", None)
    try:
        task = registry.get_task(st.session_state["lab task"])
        pair = position_patching.draw_pair(task, int(st.session_state["lab seed"]), reader(typed("model") or ""))
    except UserError as error:
        st.session_state["lab refused"] = str(error)
        return
    for name, value in pair._asdict().items():
        st.session_state[key(name)] = value


def form() -> dict[str, Any]:
    chosen = registry.get_analysis(NAME)
    help = {name: widgets.plain(one.help) for name, one in chosen.parameters.items()}
    left, middle, right, button = st.columns([5, 4, 2, 3], vertical_alignment="bottom")
    with left:
        names = [*pretrained.EMBEDDED, *pretrained.local()]
        names += [name for name in [typed("model")] if name and name not in names]
        st.selectbox(
            "model", names, key=key("model"), accept_new_options=True,
            help="An embedded model, a name of the model hub, or the id of a run that trained one.",
        )  # fmt: skip
    tasks = list(registry.tasks())
    middle.selectbox("a pair from a task", tasks, index=tasks.index("ioi"), key="lab task")
    right.number_input("seed", 0, None, 0, key="lab seed")
    button.button("Take this pair", on_click=take, icon=":material/casino:", width="stretch")
    if refused := st.session_state.pop("lab refused", None):
        with st.container(border=True):  # beside what may be refused of the fields
            st.text(refused[:1].upper() + refused[1:])
    for column, name in zip(st.columns(2), ("clean", "corrupted"), strict=True):
        column.text_area(f"{name} prompt", key=key(name), height=100, help=help[name])
    right, wrong, spaced = st.columns([4, 4, 5], vertical_alignment="center")
    # Areas, as an answer may be a line's end.
    right.text_area("right answer", key=key("right"), height=68, help=help["right"])
    wrong.text_area("wrong answer", key=key("wrong"), height=68, help=help["wrong"])
    spaced.toggle("a space before the answers", key=key("space"), help=help["space"])
    columns = st.columns(4)
    for column, (name, label) in zip(columns, FIELDS.items(), strict=False):
        column.selectbox(label, registry.choices(chosen.parameters[name].kind), key=key(name), help=help[name])
    columns[-1].text_input("positions", key=key("positions"), placeholder="all", help=help["positions"])
    return {name: typed(name) for name in defaults()}


def check(on: dict[str, Any]) -> tuple[list[list[str]], list[bool]] | None:
    """The tokens of both prompts and which differ, if the tokenizer is here. Raises UserError for what is refused."""
    pair = on["clean"], on["corrupted"], on["right"], on["wrong"]
    position_patching.check_texts(*pair)
    widgets.no_paths({"model": on["model"], "positions": on["positions"]})
    tokens = reader(on["model"])
    if tokens is None:
        return None
    ids = position_patching.read_pair(tokens, tokens.n_ctx, *pair, on["space"])
    position_patching.read_positions(on["positions"], len(ids.clean))
    return [tokens.token_strings(side.tolist()) for side in ids[:2]], (ids.clean != ids.corrupted).tolist()


# ---- what comes of it ----


def aligned(words: Sequence[Sequence[str]], differing: Sequence[bool]) -> None:
    """Both prompts, token by token; the rows in which anything differs, where there are many."""
    n = len(differing)
    across = math.ceil(n / math.ceil(n / ACROSS))  # rows of one length
    rows = [range(at, min(at + across, n)) for at in range(0, n, across)]
    shown = rows if len(rows) <= BLOCKS else [row for row in rows if any(differing[i] for i in row)][:BLOCKS]
    left_out = f"; {len(rows) - len(shown)} of {len(rows)} rows are left out" if len(shown) < len(rows) else ""
    st.caption(f"{n} tokens; {sum(differing)} {'differs' if sum(differing) == 1 else 'differ'}, marked ≠{left_out}")
    for row in shown:
        cells = {str(i): [token(words[side][i], side if differing[i] else None) for side in range(2)] for i in row}
        st.table({"position": ["clean", "corrupted"], **cells}, border="horizontal", hide_index=True)


def token(text: str, side: int | None) -> str:
    shown = text.translate(SIGNS)
    shown = widgets.plain(shown.strip() or shown.replace(" ", "␣") or "∅")
    return shown if side is None else f":{('blue', 'orange')[side]}-background[**≠ {shown}**]"


def outcome(run: Run) -> None:
    result = run.result
    differing = [i in result.differing for i in range(len(result.clean_tokens))]
    aligned([result.clean_tokens, result.corrupted_tokens], differing)
    columns = st.columns(4, vertical_alignment="center")
    for column, (label, value) in zip(
        columns,
        (
            ("clean prompt", result.clean),
            ("corrupted prompt", result.corrupted),
            ("difference", result.clean - result.corrupted),
        ),
        strict=False,
    ):
        column.metric(f"{widgets.plain(result.unit)}, {label}", canvas.number(value, 3, signed=False))
    with columns[-1]:
        st.page_link("views/run.py", label="The run", icon=":material/open_in_new:", query_params={"run": run.id})
    widgets.chart(plots.figure(result), key="lab map")
    st.markdown(f"**The number:** {widgets.plain(plots.definition(result))}.")
    for table in plots.tables(result):
        st.subheader(table.title, anchor=False)
        cells = {widgets.plain(name): list(map(widgets.plain, column)) for name, column in table.columns.items()}
        st.table(cells, border="horizontal", hide_index=True)


st.title("Patch a pair of prompts", anchor=False)
st.caption("Two prompts that ask for different answers: which layer carries, at which position, what differs?")
fill()
on = form()
found = addressed()
if found is not None and fields(found) != on:
    found = None
if found is None:
    try:
        read = check(on)
        found = runs.find(NAME, **on)
        if found is None:
            if read is None:
                st.caption("The model is not on this machine yet: a run fetches it, and checks the tokens.")
            else:
                aligned(*read)
            widgets.start(["run", NAME, *(f"--{name}={value}" for name, value in on.items())], "Patch")
    except UserError as error:
        widgets.refusal(str(error))
keep(on, found)
if found is not None:
    with widgets.whole(found):
        outcome(found)
