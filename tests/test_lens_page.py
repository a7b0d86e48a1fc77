"""The page of a lens in a real browser: what it shows, every control, and that its numbers are the model's."""

import dataclasses
import itertools
import json
import math
import re

import checkpoints
import pytest
import tiny
import torch
from browser import Browser

import ponder_hf
from ponder_hf import PonderingError
from ponder_hf.lenses import MEASURES, interventions
from ponder_hf.lenses.page import page


TEXT = "once upon a time there was one cat and two dogs who sat by the sea"
TITLES = {name: name.capitalize() for name in MEASURES}


@pytest.fixture(scope="module")
def browser():
    opened = Browser()
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def silent_console(request):
    """Whatever a test does in the browser, the console has nothing to complain of."""
    yield
    if "browser" in request.fixturenames:
        assert request.getfixturevalue("browser").complaints() == []


def look(steps=2, text=TEXT, **settings):
    torch.manual_seed(0)
    model = tiny.pondering_model("llama", base_changes={"scale": 6.0}, pondering_steps=steps)
    return ponder_hf.lens(model, checkpoints.word_tokenizer(), text, **{"name": f"S of {steps}", **settings})


@pytest.fixture(scope="module")
def one():
    return look()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one):
    made = tmp_path_factory.mktemp("pages")
    (made / "one.html").write_text(one.to_html(), encoding="utf-8")
    (made / "two.html").write_text(one.to_html(look(3)), encoding="utf-8")
    return made


def cell(place, index, look=0):
    return f'td[data-look="{look}"][data-token="{place}"][data-pass="{index}"]'


def number_in(text):
    """A number as the page writes it for people, and how far rounding may have moved it."""
    if text.startswith("<"):
        return 0.0005, 0.0005
    digits = re.fullmatch(r"([\d.,]+)(e-\d+)?( %)?", text)
    value, exponent, percent = digits[1].replace(",", ""), digits[2] or "", bool(digits[3])
    scale = 0.01 if percent else 1.0
    step = 10.0 ** -(len(value.partition(".")[2])) * float(f"1{exponent}")
    return float(value + exponent) * scale, 0.51 * step * scale


# What is shown.


def test_tokens_by_passes(browser, folder, one):
    browser.open(folder / "one.html")
    assert browser.driver.title == "A lens on S of 2"
    assert browser.texts("tbody th") == one.tokens
    assert [text[:6] for text in browser.texts("thead th")] == ["token", "pass 0", "pass 1", "pass 2", "came"]
    expected = [
        one.strings[int(one.readings.top_ids[index, place, 0])]
        for place in range(len(one.tokens))
        for index in range(3)
    ]
    assert browser.texts("td[data-pass] b") == expected
    assert "".join(browser.texts(".text span")) == "".join(one.tokens)
    assert browser.texts("td.next") == [*one.tokens[1:], ""]
    rights = len(browser.all("td.right"))
    assert rights == (one.readings.rank == 1).sum()


def test_every_number_is_the_model_s(browser, folder, one):
    browser.open(folder / "one.html")
    stored = browser.script("return looks[0]")
    for name in MEASURES:
        for found, expected in zip(itertools.chain(*stored[name]), one.measure(name).flatten().tolist(), strict=True):
            assert (found is None) == math.isnan(expected)
            assert found is None or found == pytest.approx(expected, rel=6e-4)
    for name, distances in one.readings.distances.items():
        for found, expected in zip(
            itertools.chain(*stored["distances"][name]), distances.flatten().tolist(), strict=True
        ):
            assert (found is None) == math.isinf(expected)
            assert found is None or found == pytest.approx(expected, rel=6e-4)
    for index, place in itertools.product(range(3), range(len(one.tokens))):
        top = stored["top"][index][place]
        assert [stored["strings"][each] for each in top[::2]] == [
            one.strings[token_id] for token_id in one.readings.top_ids[index, place].tolist()
        ]
        assert top[1::2] == pytest.approx(one.readings.top_probabilities[index, place].tolist(), rel=6e-4)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_fills_the_cells_with_its_numbers(browser, folder, one, name):
    browser.open(folder / "one.html")
    browser.script("document.querySelector(arguments[0]).click()", f"input[value={name}]")
    shown = browser.texts("td[data-pass] small")
    expected = one.measure(name).T.flatten().tolist()
    assert len(shown) == len(expected)
    for text, value in zip(shown, expected, strict=True):
        if math.isnan(value):
            assert text == ""
        else:
            found, tolerance = number_in(text)
            assert abs(found - value) <= tolerance + 6e-4 * value
    levels = browser.script(
        "return [...document.querySelectorAll('td[data-pass]')].map(e => +e.style.getPropertyValue('--level'))"
    )
    assert 0 <= min(levels) < max(levels) <= 1
    # More of it, or a better rank, is more colour.
    known = [(value, level) for value, level in zip(expected, levels, strict=True) if not math.isnan(value)]
    known.sort(key=lambda pair: -pair[0] if name == "rank" else pair[0])
    assert all(before[1] <= after[1] for before, after in itertools.pairwise(known))
    assert TITLES[name] in browser.one("#key").text


def test_the_chosen_cell_in_full(browser, folder, one):
    browser.open(folder / "one.html")
    browser.one(cell(5, 1)).click()
    assert "After token 5, pass 1" in browser.one("#detail").text
    assert browser.texts(".bars li span:first-child")[:10] == [
        one.strings[token_id] for token_id in one.readings.top_ids[1, 5].tolist()
    ]
    for text, expected in zip(browser.texts(".bars em")[:10], one.readings.top_probabilities[1, 5], strict=True):
        found, tolerance = number_in(text)
        assert abs(found - expected) <= tolerance + 1e-4
    assert "this one came" in browser.texts(".bars li.came")[0]
    rows = {row.split()[0]: row.split()[1:] for row in browser.one(".numbers").text.splitlines()}
    assert rows["Rank"] == [str(int(rank)) for rank in one.readings.rank[:, 5]]
    assert browser.texts(".numbers tr:first-child .current") == ["1"]
    drafts = " · ".join(one.strings[token_id] for token_id in one.readings.drafts[:, 5].tolist())
    assert drafts in browser.one("#detail").text.replace(" ✓", "")


# Controls.


def test_the_slider_goes_through_the_passes(browser, folder):
    browser.open(folder / "one.html")
    slider, seen = browser.one("#pass"), []
    browser.one(cell(4, 2)).click()
    slider.click()
    browser.press("\ue011")  # Home
    for index in range(3):
        assert slider.get_attribute("aria-valuetext") == f"pass {index} of 2"
        assert browser.one("td.chosen").get_attribute("data-pass") == str(index)
        assert browser.one("th.current").text.startswith(f"pass {index}")
        assert f"After token 4, pass {index}" in browser.one("#detail").text
        levels = "return [...document.querySelectorAll('.text span')].map(e => e.style.getPropertyValue('--level'))"
        seen.append(browser.script(levels))
        browser.press("\ue014")  # right
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_pointing_shows_a_cell_and_leaving_shows_the_chosen_one_again(browser, folder):
    browser.open(folder / "one.html")
    browser.one(cell(1, 0)).click()
    browser.point_at(browser.one(cell(6, 2)))
    assert "After token 6, pass 2" in browser.one("#detail").text
    browser.point_at(browser.all(".text span")[3])
    assert "After token 3, pass 0" in browser.one("#detail").text
    browser.point_at(browser.one("h1"))
    assert "After token 1, pass 0" in browser.one("#detail").text


def test_a_word_of_the_text_chooses_its_token(browser, folder):
    browser.open(folder / "one.html")
    browser.all(".text span")[7].click()
    assert browser.one("td.chosen").get_attribute("data-token") == "7"
    assert len(browser.all(".text .chosen")) == 1
    browser.script("document.querySelector('thead th[data-pass=\"0\"]').click()")
    assert browser.one("td.chosen").get_attribute("data-pass") == "0"


def test_by_keyboard_alone(browser, folder, one):
    browser.open(folder / "one.html")
    down, up, left, right, home, end = "\ue015", "\ue013", "\ue012", "\ue014", "\ue011", "\ue010"
    tab, page_down, control = "\ue004", "\ue00f", "\ue009"
    stops = []
    for _ in range(7):
        browser.press(tab)
        stops.append(browser.script("const e = document.activeElement; return e.id || e.dataset.pass || e.value"))
    # Each control once, one cell of the table (a tab stop in each scrolling part may lie between), then the panel.
    assert stops[:4] == ["probability", "pass", "exit", "theme"]
    assert len(browser.all('td[tabindex="0"]')) == 1
    browser.script("document.querySelector('td[tabindex=\"0\"]').focus()")
    where = "const d = document.activeElement.dataset; return [+d.token, +d.pass]"
    last = len(one.tokens) - 1
    for key, expected in (
        (home, [0, 0]), (right, [0, 1]), (down, [1, 1]), (page_down, [11, 1]), (up, [10, 1]), (left, [10, 0]),
        (end, [10, 2]), ((control, end), [last, 2]), ((control, home), [0, 0]), (up, [0, 0]),
    ):  # fmt: skip
        browser.press(*key)
        assert browser.script(where) == expected
        assert f"After token {expected[0]}, pass {expected[1]}" in browser.one("#detail").text


def test_an_exit_marks_where_tokens_stop(browser, folder, one):
    browser.open(folder / "one.html")
    assert not browser.all("td.stop")
    assert not browser.one("#threshold").is_displayed()
    for name in ("kl", "entropy", "argmax"):
        choose = (
            "const e = document.getElementById('exit'); e.value = arguments[0]; e.dispatchEvent(new Event('change'))"
        )
        browser.script(choose, name)
        assert float(browser.one("#threshold").get_attribute("value")) == one.exit_thresholds[name]
        assert browser.one("#threshold").is_displayed()
        threshold = one.readings.distances[name][1].median().item() * 1.001
        browser.one("#threshold").clear()
        browser.one("#threshold").send_keys(str(threshold))
        stops = one.readings.stops(name, threshold).tolist()
        shown = browser.script("return [...document.querySelectorAll('td.stop')].map(e => +e.dataset.pass)")
        assert shown == stops
        assert f"{sum(stops) / len(stops) + 1:.2f} of 3 passes a token" == browser.one("#saved").text
        assert len(browser.all("td.spared")) == sum(2 - stop for stop in stops)
    browser.script(choose, "")
    assert not browser.all("td.stop, td.spared")


def test_two_side_by_side(browser, folder):
    browser.open(folder / "two.html")
    assert browser.texts("h2") == ["S of 2", "S of 3"]
    left, right = (section.rect for section in browser.all("section.look"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    browser.one(cell(5, 3, look=1)).click()
    assert browser.texts("#detail h4") == ["S of 2", "S of 3"], "both models' predictions of the same token"
    assert len(browser.all(".bars")) == 2
    assert [each.get_attribute("data-pass") for each in browser.all('td[tabindex="0"]')] == ["2", "3"]
    browser.script("const e = document.getElementById('exit'); e.value = 'kl'; e.dispatchEvent(new Event('change'))")
    assert browser.one("#saved").text.count("passes a token") == 2


def test_texts_that_differ_are_not_compared(browser, tmp_path, one):
    other = look(text="once upon a sea there was one cat")
    (tmp_path / "page.html").write_text(one.to_html(other), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    browser.one(cell(2, 1)).click()
    assert len(browser.all(".bars")) == 2
    browser.one(cell(4, 1)).click()
    assert len(browser.all(".bars")) == 1, "the same word behind other words"


# For everybody.


LUMINANCE = """
const parse = (c) => { const x = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  x.fillStyle = c; x.fillRect(0, 0, 1, 1); return [...x.getImageData(0, 0, 1, 1).data].slice(0, 3); };
const light = (c) => parse(c).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
const e = arguments[0], s = getComputedStyle(e);
const paper = light(s.backgroundColor), ink = light(s.color);
return [paper, (Math.max(paper, ink) + .05) / (Math.min(paper, ink) + .05)];
"""


PAPER = """
let e = arguments[0];
while (getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
return getComputedStyle(e).backgroundColor;
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_can_be_read_and_told_apart_in_grey(browser, folder, dark):
    """WCAG's contrast of 4.5 at every level, and a lightness that only rises or only falls."""
    browser.open(folder / "one.html", dark=dark)
    element, lights = browser.one(cell(3, 1)), []
    for level in range(0, 101, 4):
        browser.script("arguments[0].style.setProperty('--level', arguments[1])", element, level / 100)
        paper, contrast = browser.script(LUMINANCE, element)
        assert contrast >= 4.5, f"level {level}"
        lights.append(paper)
    steps = [after - before for before, after in itertools.pairwise(lights)]
    assert all(step > 0 for step in steps) or all(step < 0 for step in steps)
    assert abs(lights[-1] - lights[0]) > 0.45
    for selector in ("body", "#detail", "thead th small", ".soft", "td.next"):
        found = browser.one(selector)
        paper = browser.script(PAPER, found)
        browser.script("arguments[0].style.backgroundColor = arguments[1]", found, paper)
        assert browser.script(LUMINANCE, found)[1] >= 4.5, selector


def test_light_and_dark_can_be_switched(browser, folder):
    paper = "return getComputedStyle(document.body).backgroundColor"
    found = []
    for dark in (False, True):
        browser.open(folder / "one.html", dark=dark)
        for _ in range(3):
            found.append(browser.script(paper))
            browser.one("#theme").click()
    light, dark = found[:2]
    assert light != dark
    assert found == [light, dark, light, dark, light, dark]


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_narrow_screen(browser, folder, name):
    browser.open(folder / f"{name}.html", width=360, height=740)
    assert browser.script("return document.documentElement.scrollWidth") <= 360
    detail = browser.one("#detail")
    assert detail.rect["height"] < 100, "folded, so that the table is to be seen"
    browser.tap(browser.one(cell(6, 1)))
    assert browser.one("td.chosen").get_attribute("data-token") == "6"
    assert 100 < detail.rect["height"] <= 0.5 * 740
    fold = browser.one("#fold")
    assert fold.get_attribute("aria-expanded") == "true"
    fold.click()
    assert fold.get_attribute("aria-expanded") == "false"
    assert detail.rect["height"] < 100
    heights = "return [...document.querySelectorAll('label.pill, button')].map(e => e.getBoundingClientRect().height)"
    assert min(browser.script(heights)) >= 24, "large enough for a finger"


def test_what_a_screen_reader_is_told(browser, folder, one):
    browser.open(folder / "one.html")
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [
        (node.get("role", {}).get("value"), node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"]
    ]
    names = {role: [name for each, name in told if each == role] for role, _ in told}
    assert names["grid"] == ["S of 2: tokens by passes"]
    assert [name[:6] for name in names["columnheader"] if "nats" in name] == ["pass 0", "pass 1", "pass 2"]
    assert [name for name in names["rowheader"] if name in one.tokens] == one.tokens
    assert names["table"] == ["This token in every pass"]
    top = one.readings.top_ids[1, 5, 0].item()
    (described,) = [name for name in names["gridcell"] if name.startswith("was, pass 1:")]
    assert described.startswith(f"was, pass 1: predicts {one.strings[top]}, ")
    assert f"one came, rank {int(one.readings.rank[1, 5])}" in described or "which came" in described
    assert "; probability " in described
    assert names["slider"] == ["Pass"]
    assert {"Probability", "Rank", "Entropy", "Divergence", "Share"} <= set(names["radio"])
    assert names["combobox"] == ["Early exit"]
    assert all(name for role in ("button", "radio", "grid", "form", "group") for name in names[role])
    assert browser.one("html").get_attribute("lang") == "en"


# What it is made of.


def test_it_is_self_contained_and_small(one):
    """200 tokens of a large vocabulary, two models, S = 3."""
    torch.manual_seed(0)
    made = one.to_html()
    assert "default-src 'none'" in made
    assert not re.search(r"""(src|href)=|url\(|@import|https?://|fetch\(|XMLHttp""", made)
    strings = {index: f" token{index:05d}" for index in range(50_000)}
    shares, ids = torch.rand(4, 200, 10), torch.randint(0, 50_000, (4, 200, 10))
    matrix = torch.rand(4, 200).double()
    large = dataclasses.replace(
        one,
        token_ids=ids[0, :, 0].tolist(),
        prompt_tokens=200,
        strings={each: strings[each] for each in ids.unique().tolist()},
        readings=dataclasses.replace(
            one.readings,
            **dict.fromkeys(MEASURES, matrix),
            distances=dict.fromkeys(one.readings.distances, matrix),
            top_ids=ids,
            top_probabilities=shares,
            drafts=ids[:3, :, 0],
        ),
    )
    assert len(large.to_html(large).encode()) < 1_000_000


def test_a_token_cannot_become_a_part_of_the_page(browser, tmp_path, one):
    bad = "</script><img src=x onerror=alert(1)><!--<script>"
    changed = dataclasses.replace(one, name=bad, strings={**one.strings, one.token_ids[2]: bad})
    (tmp_path / "page.html").write_text(changed.to_html(), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.texts("tbody th")[2] == bad
    assert browser.texts("h2") == [bad]
    assert not browser.all("img")


def test_what_the_model_wrote_and_passes_that_were_never_trained(browser, tmp_path):
    found = look(text="once upon a", max_new_tokens=3, pondering_steps=4, intervention=interventions.scale(0.5))
    (tmp_path / "page.html").write_text(found.to_html(title="Mine"), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.driver.title == browser.one("h1").text == "Mine"
    facts = browser.one(".look p").text
    assert "the last 3 written by the model" in facts
    assert "changed: scaled by 0.5" in facts
    assert "trained with 3 passes" in facts
    assert [text.removeprefix("pass ") for text in browser.texts("thead th")[4:6]] == ["3untrained", "4untrained"]
    assert len(browser.all("tr.written")) == len(browser.all(".text .written")) == 3


def test_a_plain_model_and_a_single_token(browser, tmp_path):
    found = ponder_hf.lens(tiny.base_model("llama"), checkpoints.word_tokenizer(), "cat")
    (tmp_path / "page.html").write_text(found.to_html(), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.texts("tbody th") == ["cat"]
    assert len(browser.all("td[data-pass]")) == 1


def test_in_a_notebook_it_is_a_frame_of_its_own(browser, tmp_path, one):
    (tmp_path / "notebook.html").write_text(
        f"<!DOCTYPE html><title>n</title><body>{one._repr_html_()}", encoding="utf-8"
    )
    browser.open(tmp_path / "notebook.html")
    browser.driver.switch_to.frame(browser.one("iframe"))
    assert browser.texts("tbody th") == one.tokens
    browser.driver.switch_to.default_content()


def test_at_most_two(one):
    with pytest.raises(PonderingError, match="one or two looks side by side, got 3"):
        page([one, one, one])
    assert json.loads(page([one]).split('id="data">')[1].split("</script>")[0])["looks"][0]["name"] == "S of 2"
