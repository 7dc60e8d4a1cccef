"""Text steps against lxml and the Unicode database, conditions against DuckDB."""

import json
import time
import unicodedata
from collections.abc import Mapping
from typing import Any

import duckdb
import lxml.html
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbeam.clean import parse_image_filter
from mmbeam.clean.text import TEXT_STEPS, check_steps, clean_text
from mmbeam.clean.where import KIND_OF_NAME, compile_where, rejecting_expression, where_needs
from mmbeam.errors import UsageError
from mmbeam.types import Audio, Sample, Video

UNICODE = st.text(alphabet=st.characters(codec="utf-8"), max_size=40)
ODD = st.text(
    alphabet="aA\u0301\u0130ß\u03a3\u03c3\u03c2 \t\r\n\f\x00\x1f\x85\u200b\u200c\u200d\u2028\u00ad\ufeff\u0600日<>&;#",
    max_size=20,
)


class TestSteps:
    @pytest.mark.parametrize("name", [name for name in TEXT_STEPS if name != "markup"])
    @given(text=UNICODE | ODD)
    def test_idempotent(self, name: str, text: str) -> None:
        once = TEXT_STEPS[name](text)
        assert TEXT_STEPS[name](once) == once

    @given(UNICODE)
    def test_markup_is_idempotent_without_escaped_markup(self, text: str) -> None:
        once = TEXT_STEPS["markup"](text)
        if not set("<&") & set(once):
            assert TEXT_STEPS["markup"](once) == once

    @given(UNICODE | ODD)
    def test_normal_forms(self, text: str) -> None:
        assert unicodedata.is_normalized("NFC", TEXT_STEPS["nfc"](text))
        assert unicodedata.normalize("NFD", TEXT_STEPS["nfc"](text)) == unicodedata.normalize("NFD", text)
        assert unicodedata.is_normalized("NFKC", TEXT_STEPS["nfkc"](text))

    @given(UNICODE | ODD)
    def test_control_characters(self, text: str) -> None:
        once = TEXT_STEPS["control"](text)
        left = {char for char in once if unicodedata.category(char) in ("Cc", "Cf")}
        assert left <= set(
            "\n\t\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
        )
        kept = [char for char in text if unicodedata.category(char) not in ("Cc", "Cf")]
        assert [char for char in once if unicodedata.category(char) not in ("Cc", "Cf")] == kept

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a\r\nb\rc\fd\x85e", "a\nb\nc\nd\ne"),
            ("tab\tand\nnewline", "tab\tand\nnewline"),
            ("\x00nul\x1b[31m\x7f", "nul[31m"),
            ("\ufeffsoft\u00adhyphen\u200b\u202e", "softhyphen"),
            ("👩\u200d🚀 \u0645\u06cc\u200c\u062e", "👩\u200d🚀 \u0645\u06cc\u200c\u062e"),
            ("\u06dd12", "\u06dd12"),
        ],
    )
    def test_control_examples(self, text: str, expected: str) -> None:
        assert TEXT_STEPS["control"](text) == expected

    @given(UNICODE | ODD)
    def test_whitespace(self, text: str) -> None:
        once = TEXT_STEPS["whitespace"](text)
        assert once.split() == text.split()
        assert "  " not in once
        assert once == once.strip()

    def test_lower(self) -> None:
        assert TEXT_STEPS["lower"]("STRASSE Straße ΟΔΟΣ İ") == "strasse straße οδος i̇"

    def test_order_is_kept_and_unknown_steps_are_named(self) -> None:
        assert clean_text(" A&nbsp;B ", ("markup", "whitespace", "lower")) == "a b"
        assert clean_text(" A&NBSP;B ", ("lower", "markup")) == " a\xa0b "
        assert clean_text(" A ", ()) == " A "
        check_steps(tuple(TEXT_STEPS))
        with pytest.raises(UsageError, match="unknown text cleaning step 'nfd'; the steps are nfc, nfkc, control"):
            check_steps(("nfc", "nfd"))


WORDS = st.text(alphabet="abc ÄÖ日&\"'>é", min_size=1, max_size=8)
ATTRIBUTES = st.sampled_from(["", " class=x", ' title="a > b"', " data-x='<i>'", " hidden", ' alt="&lt;b&gt;"'])


def element(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    names = st.sampled_from(["p", "b", "DIV", "span", "i", "li", "h1", "em"])
    inner = st.lists(children, max_size=3).map("".join)
    return st.tuples(names, ATTRIBUTES, inner).map(lambda parts: f"<{parts[0]}{parts[1]}>{parts[2]}</{parts[0]}>")


LEAVES = (
    WORDS.map(lambda words: words.replace("&", "&amp;").replace(">", "&gt;"))
    | st.sampled_from(["&eacute;", "&#169;", "&#x65e5;", "&lt;b&gt;", "&nbsp;", "<br>", "<br/>", "<!-- a <b> c -->"])
    | st.sampled_from(['<script>if (a < b) { x = "<p>"; }</script>', "<style>p > b { color: red }</style>"])
)
HTML = st.lists(st.recursive(LEAVES, element, max_leaves=8), min_size=1, max_size=4).map("".join)


def text_content(markup: str) -> str:
    """Return the text that lxml's HTML parser extracts, without scripts and styles."""
    tree = lxml.html.fromstring(f"<div>{markup}</div>")
    for node in list(tree.iter("script", "style", lxml.etree.Comment)):
        node.drop_tree()
    return str(tree.text_content())


class TestMarkup:
    @settings(max_examples=100)
    @given(HTML)
    def test_equals_lxml_but_for_whitespace(self, markup: str) -> None:
        assert "".join(TEXT_STEPS["markup"](markup).split()) == "".join(text_content(markup).split())

    @pytest.mark.parametrize(
        ("markup", "expected"),
        [
            ("un<b>believ</b>able", "unbelievable"),
            ("one<br>two<p>three</p>four", "one\ntwo\nthree\nfour"),
            ("a < b and c > d, I <3 you, x<y", "a < b and c > d, I <3 you, x<y"),
            ("AT&amp;T &copy; &lt;b&gt; &amp;lt;", "AT&T © <b> &lt;"),
            ("AT&T &unknown; &#0;", "AT&T &unknown; \ufffd"),
            ("<a title=it's>t</a>", "t"),
            ("a<!-- b -->c<!-- d", "ac"),
            ("a<script>alert('<b>')", "a"),
            ("<?xml version='1.0'?><!DOCTYPE html><t:u>x<![CDATA[<y>]]></t:u>", "x<y>"),
            ("&#" + "9" * 5000 + ";", "\ufffd"),
        ],
    )
    def test_examples(self, markup: str, expected: str) -> None:
        assert TEXT_STEPS["markup"](markup) == expected

    @pytest.mark.parametrize(
        "unit", ["<", "<!--", "<a ", '<a b="', "<a x='", "<script ", "<script>", "<![CDATA[", "&#"]
    )
    def test_time_is_linear(self, unit: str) -> None:
        begin = time.process_time()
        TEXT_STEPS["markup"](unit * (400_000 // len(unit)))
        assert time.process_time() - begin < 2


def values(**known: Any) -> Mapping[str, Any]:
    return dict.fromkeys(KIND_OF_NAME) | known


class TestWhere:
    @pytest.mark.parametrize(
        ("expression", "expected"),
        [
            ("image_width >= 256", True),
            ("256 <= image_width < 300", True),
            ("300 <= image_width < 400", False),
            ("0.5 < image_width / image_height < 2", True),
            ("image_width - image_height * 2 == -6 + 0", True),
            ("text_words > 3 or 'cat' in text", True),
            ("'dog' not in text and key == 'a/1'", True),
            ("metadata.license in ('cc0', 'cc-by')", True),
            ("metadata['nested']['list'][1] == 5", True),
            ("metadata.nested.list[7] == 5", False),
            ("metadata.nested.list[7] is None", True),
            ("5 in metadata.nested.list", True),
            ("'list' in metadata.nested", True),
            ("metadata.flag", True),
            ("not metadata.flag", False),
            ("audio_seconds < 10", False),
            ("not audio_seconds < 10", False),
            ("audio_seconds is None", True),
            ("audio_seconds is not None", False),
            ("audio_seconds < 10 or image_width > 1", True),
            ("audio_seconds < 10 and image_width < 1", False),
            ("not (audio_seconds < 10 and image_width < 1)", True),
            ("text > 3", False),
            ("not text > 3", False),
            ("text != 3", False),
            ("'a' + text == 'aa'", False),
            ("image_width / 0 > 1", False),
            ("metadata.license + 1 > 0", False),
            ("metadata.__class__ is None", True),
            ("key in ['b', 'a/1']", True),
            ("key not in ('b', audio_seconds)", False),
            ("not (audio_seconds < 10 or image_width < 1)", False),
            ("True", True),
            ("None", False),
            (" image_width\n> 1 ", True),
        ],
    )
    def test_examples(self, expression: str, expected: bool) -> None:
        metadata = {"license": "cc0", "nested": {"list": [4, 5]}, "flag": True}
        known = values(image_width=256, image_height=131, text="A cat", text_words=2, key="a/1", metadata=metadata)
        assert compile_where(expression)(known) is expected

    @pytest.mark.parametrize(
        ("expression", "column", "problem"),
        [
            ("image_widht > 3", 1, "unknown name 'image_widht'"),
            ("text_chars > 3 and nope", 20, "unknown name 'nope'"),
            ("'日本' == nope", 9, "unknown name 'nope'"),
            ("image_width >", 14, "invalid syntax"),
            ("text.upper()", 1, "only comparisons"),
            ("open('x')", 1, "only comparisons"),
            ("text.__class__", 1, "only metadata has entries"),
            ("().__class__", 1, "only metadata has entries"),
            ("metadata[text]", 10, "expected a string or a number"),
            ("metadata[1:2]", 10, "expected a string or a number"),
            ("2 ** 100", 1, r"arithmetic is \+ - \* /"),
            ("image_width % 2 == 0", 1, r"arithmetic is \+ - \* /"),
            ("~image_width", 1, "the only supported sign"),
            ("text is 'a'", 9, "supports only None"),
            ("lambda: 1", 1, "only comparisons"),
            ("[x for x in text]", 1, "only comparisons"),
            ("(1, 2) == text", 1, "only comparisons"),
            ("f'{text}'", 1, "only comparisons"),
            ("b'a' in text", 1, "is not a number, string"),
            ("1j > 0", 1, "is not a number, string"),
            ("(text := 1)", 2, "only comparisons"),
            ("", 1, "invalid syntax"),
        ],
    )
    def test_what_is_refused(self, expression: str, column: int, problem: str) -> None:
        with pytest.raises(UsageError, match=f"where, column {column}: .*{problem}") as caught:
            compile_where(expression)
        lines = str(caught.value).splitlines()
        assert lines[1] == f"  {expression}"
        assert lines[2].index("^") == column + 1
        assert lines[3] == "names: " + ", ".join(KIND_OF_NAME)

    @pytest.mark.parametrize(
        "expression",
        ["-" * 1999 + "1", "(" * 1000, "not " * 400 + "text", "1+" * 900 + "1", "a" * 2001, "text\0", "[" * 99],
    )
    def test_size_is_bounded(self, expression: str) -> None:
        with pytest.raises(UsageError, match=r"^where"):
            compile_where(expression)

    @pytest.mark.parametrize("expression", ["not " * 149 + "text", "metadata" + ".a" * 140, "1+" * 70 + "1 > 0"])
    def test_deepest_allowed_expression_runs(self, expression: str) -> None:
        assert compile_where(expression)(values(text="", metadata={})) in (True, False)

    @given(st.text(alphabet="abmetadata.'[]()<>=!+-*/ 01andornotis\n\\\"", max_size=40))
    def test_any_text(self, expression: str) -> None:
        try:
            predicate = compile_where(expression)
        except UsageError:
            return
        assert predicate(values(metadata={})) in (True, False)

    def test_needs(self) -> None:
        assert where_needs("image_width > 3 and text_words > 2") == {"image", "text"}
        assert where_needs("image_pixels > 3 or metadata.a.text is None") == {"image", "metadata"}
        assert where_needs("audio_seconds < 3") == {"audio"}
        assert where_needs("key > 'a'") == frozenset()


COLUMNS = {"image_width": "BIGINT", "image_height": "BIGINT", "audio_seconds": "DOUBLE", "text": "VARCHAR"}
NUMBERS = st.sampled_from(["image_width", "image_height", "audio_seconds", "metadata.n"]) | st.integers(-3, 3).map(str)
TEXTS = st.sampled_from(["text", "metadata.s", "'a'", "'b'", "'ab'", "''"])


def both(python: str, sql: str) -> tuple[str, str]:
    return python, sql


def arithmetic(terms: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(terms, st.sampled_from("+-*/"), terms).map(lambda parts: f"({' '.join(parts)})")


NUMBER_TERMS = st.recursive(NUMBERS, arithmetic, max_leaves=3)
ORDERS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
CONDITIONS = st.one_of(
    st.tuples(NUMBER_TERMS, ORDERS, NUMBER_TERMS).map(lambda p: both(" ".join(p), " ".join(p))),
    st.tuples(TEXTS, ORDERS, TEXTS).map(lambda p: both(" ".join(p), " ".join(p))),
    st.tuples(NUMBER_TERMS, ORDERS, NUMBERS, ORDERS, NUMBERS).map(
        lambda p: both(" ".join(p), f"({p[0]} {p[1]} {p[2]} AND {p[2]} {p[3]} {p[4]})")
    ),
    st.tuples(TEXTS, TEXTS).map(lambda p: both(f"{p[0]} in {p[1]}", f"contains({p[1]}, {p[0]})")),
    st.tuples(NUMBERS, NUMBERS, NUMBERS).map(
        lambda p: both(f"{p[0]} in ({p[1]}, {p[2]})", f"{p[0]} IN ({p[1]}, {p[2]})")
    ),
    st.tuples(NUMBERS, NUMBERS).map(lambda p: both(f"{p[0]} not in ({p[1]},)", f"{p[0]} NOT IN ({p[1]})")),
    (NUMBERS | TEXTS).map(lambda name: both(f"{name} is None", f"{name} IS NULL")),
    (NUMBERS | TEXTS).map(lambda name: both(f"{name} is not None", f"{name} IS NOT NULL")),
)


def combined(conditions: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[tuple[str, str]]:
    joined = st.tuples(conditions, st.sampled_from(["and", "or"]), conditions)
    return joined.map(
        lambda p: both(f"({p[0][0]}) {p[1]} ({p[2][0]})", f"({p[0][1]}) {p[1]} ({p[2][1]})")
    ) | conditions.map(lambda p: both(f"not ({p[0]})", f"NOT ({p[1]})"))


ROWS = st.fixed_dictionaries(
    {
        "image": st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "audio_seconds": st.none() | st.sampled_from([0.5, 1.0, 3.0]),
        "text": st.none() | st.sampled_from(["", "a", "ab", "b"]),
        "n": st.none() | st.integers(-2, 3) | st.just(0.5),
        "s": st.none() | st.sampled_from(["", "a", "ab"]),
    }
)


def sample(row: Mapping[str, Any]) -> Sample:
    return Sample(
        key="k",
        shard="s.tar",
        offset=0,
        image_size=row["image"],
        audio=None if row["audio_seconds"] is None else Audio(waves={}, seconds=row["audio_seconds"]),
        text=row["text"],
        metadata=json.dumps({name: row[name] for name in ("n", "s") if row[name] is not None}),
    )


class TestSelect:
    @settings(max_examples=80, deadline=None)
    @given(st.recursive(CONDITIONS, combined, max_leaves=4), st.lists(ROWS, min_size=1, max_size=8))
    def test_equals_duckdb(self, condition: tuple[str, str], rows: list[Mapping[str, Any]]) -> None:
        python, sql = condition
        with duckdb.connect() as connection:
            connection.execute("SET ieee_floating_point_ops = false")  # 1 / 0 is null, as in mmbeam,
            connection.execute("SET error_on_division_by_zero = false")  # and not an error
            connection.execute(
                "CREATE TABLE samples (i INT, image_width INT, image_height INT, audio_seconds DOUBLE, text VARCHAR, "
                "metadata STRUCT(n DOUBLE, s VARCHAR))"
            )
            for i, row in enumerate(rows):
                sizes = row["image"] or (None, None)
                metadata = {"n": row["n"], "s": row["s"]}
                line = [i, *sizes, row["audio_seconds"], row["text"], metadata]
                connection.execute("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)", line)
            expected = connection.execute(f"SELECT i FROM samples WHERE {sql} ORDER BY i").fetchall()
        where = [(python, compile_where(python))]
        assert [(i,) for i, row in enumerate(rows) if rejecting_expression(sample(row), where) is None] == expected

    def test_names_the_first_condition_that_is_not_true(self) -> None:
        wheres = [(text, compile_where(text)) for text in ("image_width > 1", "text_words > 2", "image_height > 9")]
        a_sample = Sample(key="k", shard="s.tar", offset=0, image_size=(5, 5), text="a b", text_clean="a b c")
        assert rejecting_expression(a_sample, wheres) == "image_height > 9"  # the cleaned text counts
        assert rejecting_expression(a_sample, wheres[:2]) is None
        assert rejecting_expression(a_sample, []) is None
        assert rejecting_expression(Sample(key="k", shard="s.tar", offset=0), wheres) == "image_width > 1"

    def test_every_name_has_a_value(self) -> None:
        a_sample = Sample(
            key="k",
            shard="s.tar",
            offset=0,
            image_size=(4, 3),
            audio=Audio(waves={}, seconds=2.5),
            video=Video(frames=(), times=(), seconds=3.5, size=(6, 5)),
            text="a bé",
            metadata='{"a": NaN, "b": Infinity}',
        )
        expected = {
            "image_width": "4",
            "image_height": "3",
            "image_pixels": "12",
            "audio_seconds": "2.5",
            "video_width": "6",
            "video_height": "5",
            "video_seconds": "3.5",
            "text_chars": "4",
            "text_words": "2",
            "text": "'a bé'",
            "key": "'k'",
            "metadata.b": "999999",
        }
        for name, value in expected.items():
            order = ">" if name == "metadata.b" else "=="
            assert rejecting_expression(a_sample, [("", compile_where(f"{name} {order} {value}"))]) is None, name
        assert {name.partition(".")[0] for name in expected} == set(KIND_OF_NAME)
        assert rejecting_expression(a_sample, [("", compile_where("metadata.a is None"))]) is None  # NaN: missing
        empty = Sample(key="k", shard="s.tar", offset=0)
        for name in set(KIND_OF_NAME) - {"key"}:
            assert rejecting_expression(empty, [("", compile_where(f"{name} is None"))]) is None, name


class TestImageFilter:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [("median:3", ("median", 3.0)), ("median:15", ("median", 15.0)), ("gaussian:1.5", ("gaussian", 1.5))],
    )
    def test_parsed(self, text: str, expected: tuple[str, float]) -> None:
        assert parse_image_filter(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "median",
            "median:2",
            "median:-3",
            "median:3.5",
            "median:17",
            "median:nan",
            "blur:3",
            "gaussian:0",
            "gaussian:nan",
            "gaussian:inf",
            "gaussian:x",
            "gaussian:101",
        ],
    )
    def test_refused(self, text: str) -> None:
        with pytest.raises(
            UsageError, match="expected median:SIDE, an odd number of pixels up to 15, or gaussian:SIGMA"
        ):
            parse_image_filter(text)


@pytest.mark.parametrize("form", ["nfc", "nfkc"])
def test_many_combining_marks_are_sorted_in_linear_time(form: str) -> None:
    """CPython takes quadratic time, 20 minutes for a million."""
    for marks in ("\u0301\u0316", "\u0344\u0323\u0301", "\u0f73\u0316"):
        text = "x\u1ebf" + marks * 150 + "y\u0316\u0301"
        assert clean_text(text, (form,)) == unicodedata.normalize(form.upper(), text)
    begin = time.process_time()
    clean_text("a" + "\u0301\u0316" * 200_000, (form,))
    assert time.process_time() - begin < 5
