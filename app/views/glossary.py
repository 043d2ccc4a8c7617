"""The words of the field as this workbench uses them, and a card for each analysis. Addressed by ?term=<words>."""

from __future__ import annotations

from itertools import groupby

import streamlit as st

from app import widgets
from workbench import glossary, registry
from workbench.glossary import Card, Term


def words(term: Term) -> str:
    """One term as Markdown: its name, other names, text, and where it comes from and is computed."""
    also = f" · {widgets.plain(', '.join(term.also))}" if term.also else ""
    where = [f"*{widgets.plain(term.source)}*"] if term.source else []
    where += [widgets.plain(f"in {', '.join(term.analyses)}")] if term.analyses else []
    where += [f"`{name}`" for name in term.code]
    small = f"  \n:small[{' · '.join(where)}]" if where else ""
    return f"**{widgets.plain(term.term)}**:small[:gray[{also}]]  \n{widgets.plain(term.text)}{small}"


def whole(term: Term) -> None:
    """The term that was asked for, with links to the forms of its analyses."""
    with st.container(border=True):
        st.markdown(words(term))
        with st.container(horizontal=True):
            for name in term.analyses:
                form(name, name)


def form(name: str, label: str) -> None:
    st.page_link("views/start.py", label=label, icon=":material/play_arrow:", query_params={"form": name})


def every(found: list[Term]) -> None:
    for letter, some in groupby(found, key=lambda term: term.term[0].upper()):
        st.caption(letter)
        for term in some:
            st.markdown(words(term))


def listed(asked: str) -> None:
    found, exact = glossary.search(asked), glossary.find(asked)
    if not asked.strip():
        every(list(glossary.terms()))
    elif not found:
        st.text("No term has these words; try fewer, or empty the field to see all.")
    else:
        if exact is not None:
            whole(exact)
        rest = [term for term in found if term is not exact]
        if rest:
            st.caption(f"{len(rest)} {'more with' if exact is not None else 'with'} these words")
        for term in rest:
            st.markdown(words(term))


def method(card: Card) -> None:
    with st.expander(f"**{widgets.plain(card.name)}** · {widgets.plain(card.about)}"):
        form(card.name, "Start it")
        if card.prose:
            st.markdown("\n\n".join(map(widgets.plain, card.prose.split("\n\n"))))
        if card.parameters:
            cells = {
                "parameter": [one.name for one in card.parameters],
                "of": [registry.kind_name(one.kind) for one in card.parameters],
                "default": ["none" if one.default is None else str(one.default) for one in card.parameters],
                "what it does": [one.help for one in card.parameters],
            }
            st.table({title: list(map(widgets.plain, column)) for title, column in cells.items()}, hide_index=True)
        if card.terms:
            st.caption(f"Terms: {widgets.plain(', '.join(term.term for term in card.terms))}")
        st.caption("How it works, what it assumes and where it fails")
        st.code(card.manual, language=None, wrap_lines=True)


st.title("Glossary", anchor=False)
asked = st.text_input("search", key="term", bind="query-params", placeholder="faithfulness, eap-ig, L0", max_chars=200)
terms, methods = st.tabs([f"Terms · {len(glossary.terms())}", f"Analyses · {len(registry.analyses())}"])
with terms:
    listed(asked)
with methods:
    for card in glossary.cards():
        method(card)
