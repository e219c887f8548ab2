"""Written text is read as people read it, and whatever is written, letters come out that a reader knows."""

from __future__ import annotations

import pytest

from whisper_moe.media.spoken import letters_of, number, runs, spoken


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1,234 apples", "one thousand two hundred thirty-four apples"),
        ("It is -5.25 today", "It is minus five point two five today"),
        ("Call 9876543210", "Call nine eight seven six five four three two one zero"),
        ("room 007", "room zero zero seven"),
        ("the 22nd", "the twenty-second"),
        ("in 1999, after 2026", "in nineteen ninety-nine, after twenty twenty-six"),
        ("1999 apples", "one thousand nine hundred ninety-nine apples"),
        ("$5.50 or €3 or ₹2 lakh", "five dollars fifty or three euros or two lakh rupees"),
        ("on 2026-11-29", "on November twenty-ninth, twenty twenty-six"),
        ("on 15/08/1947", "on August fifteenth, nineteen forty-seven"),
        ("at 10:05", "at ten oh five"),
        ("at 9:00", "at nine o'clock"),
        ("50% of 3 km", "fifty percent of three kilometers"),
        ("Dr. Who vs. Mr. X", "doctor Who versus mister X"),
        ("the USA, U.K. and UNESCO", "the U S A, U K and UNESCO"),
        ("see www.example.org/a_b.", "see W W W dot example dot org slash a underscore B"),
        ("a+b@x.io", "a plus B at X dot io"),
        ("😀", "grinning face"),
        ("<|endoftext|>", "less than bar endoftext bar greater than"),
        ("3D and A4, H2O", "three D and A four, H two O"),
        ("Is it true? No. See No. 5, p. 7", "Is it true? No. See number five, page seven"),
        ("5G, 5 g, 20°C, 10 km²", "five G, five grams, twenty degrees celsius, ten kilometers squared"),
        ("$5M, €3bn, $1", "five million dollars, three billion euros, one dollar"),
        ("192.168.1.1", "one hundred ninety-two point one hundred sixty-eight point one point one"),
        ("1,2,3 and 12,5", "one,two,three and twelve,five"),
        ("World War II, 3½ hours, ¾ cup", "World War two, three and a half hours, three quarters cup"),
        ("the 1990s, 3:30 pm, 10:05:30", "the nineteen nineties, three thirty P M, ten oh five and thirty seconds"),
        ("DO NOT TOUCH THIS", "do not touch this"),
        ("it came.In we go", "it came.In we go"),
        ("9" * 30 + "th", " ".join(["nine"] * 30)),
        ("a\x00b\ud800c\u202e", "a B C"),
        ("x" * 3, "xxx"),
        ("x = 2, don't, f(y), 5 p.m. now", "X equals two, don't, F(Y), five P M now"),
        ("www.x.org", "W W W dot X dot org"),
        ("I\u2019m here, o\u2019clock", "I'm here, o'clock"),
        ("USA 1994. Do NOT touch, THE END!", "U S A one thousand nine hundred ninety-four. Do not touch, the end!"),
        ("10³, 10⁶ and 2⁵", "ten cubed, ten to the power of six and two to the power of five"),
        ("3⅓ cups, 1/2 cup", "three and a third cups, half cup"),
        (
            "₹100-200, 7 - 2 = 5, ±5",
            "one hundred to two hundred rupees, seven minus two equals five, plus or minus five",
        ),
        ("the 80s, the '90s, 1990's", "the eighties, the nineties, nineteen nineties"),
        ("May 5, 2024; March 2020; June 3rd", "May fifth, twenty twenty-four; March twenty twenty; June third"),
        ("12/25/2020, 1914-1918", "December twenty-fifth, twenty twenty, nineteen fourteen to nineteen eighteen"),
        ("from 1999 to 2005", "from nineteen ninety-nine to two thousand five"),
        ("$1.50, 1 km, 21 km, 5 ft", "one dollar fifty, one kilometer, twenty-one kilometers, five feet"),
        ("(see e.g.) at 5 p.m. Then", "(see for example) at five P M. Then"),
    ],
)
def test_english(written: str, said: str) -> None:
    assert spoken(written, "en") == said


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("५० रुपये", "पचास रुपये"),
        ("1,00,000", "एक लाख"),
        ("3.5 किमी", "तीन दशमलव पाँच किलोमीटर"),
        ("15/08/1947", "पन्द्रह अगस्त एक हज़ार नौ सौ सैंतालीस"),
        ("10:30 बजे, 10:00 बजे", "दस बजकर तीस मिनट, दस बजे"),
        ("BJP ने 4G दिया", "B J P ने चार G दिया"),
        ("20वीं सदी, 2री नहीं, 6वें", "बीसवीं सदी, दो री नहीं, छठे"),
        ("3½, 1½ और 2¾", "साढ़े तीन, डेढ़ और पौने तीन"),
        ("₹500", "पाँच सौ रुपये"),
        ("20% छूट", "बीस प्रतिशत छूट"),
        ("डॉ. शर्मा", "डॉक्टर शर्मा"),
    ],
)
def test_hindi(written: str, said: str) -> None:
    assert spoken(written, "hi") == said


def test_letters_are_small_but_where_they_stand_for_their_names() -> None:
    assert letters_of("The U S A\u2019s “Flag” – I… नमस्ते।") == "the U S A's “flag” , I. नमस्ते."
    assert letters_of("क़") == "क\u093c"
    assert letters_of("café São B M W") == "cafe sao B M double U"


def test_each_script_is_read_in_its_language() -> None:
    assert list(runs("मेरा email है, 5", "hi")) == [("hi", "मेरा "), ("en", "email "), ("hi", "है, 5")]
    assert list(runs("நன்றி ok", "en")) == [("hi", "नऩ्ऱि "), ("en", "ok")]
    assert list(runs("  ", "en")) == []


def test_symbols_are_numbered_and_strangers_passed_over() -> None:
    assert number("abc", "cab-d", 1) == [3, 1, 2]
