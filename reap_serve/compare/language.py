"""Which language a text is in, as far as its script and its commonest words tell.

Not a language identifier: it serves to count answers that leave the language of the recorded one, and says None where
it does not know. Scripts come from Unicode's names of the letters; languages of the Latin script from function words
that they do not share.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

MIN_LETTERS = 20
MIN_WORDS = 3

# Function words; those of several of these languages are counted for none.
_FUNCTION_WORDS = {
    "da": "og det som ikke jeg har til med den kan blev også være",
    "de": "der und ist nicht das ein eine mit auf für sich dem den von zu auch wird sie er es im",
    "en": "the and of to is that it with for was are this you not have from be which can",
    "es": "el los las y que en es una por con para del se como más pero sus está",
    "fr": "le les et des est une que dans pour qui sur avec pas plus du au ce elle nous vous",
    "it": "il che di gli della per non sono con una è anche come più nel dal alla questo",
    "nl": "het een en van is niet dat op te zijn met voor aan ook worden deze naar",
    "pl": "się nie jest na że do jak ale po od czy dla jego przez oraz tym",
    "pt": "não uma os as com para por mais do da em que foi são ao também seu pelo",
    "sv": "och att det som är inte på för med har till den kan också var",
    "tr": "ve bir bu için ile olarak daha çok gibi ne kadar değil olan ama sonra",
}
_LANGUAGES_OF_WORD = {
    word: {name for name, words in _FUNCTION_WORDS.items() if word in words.split()}
    for words in _FUNCTION_WORDS.values()
    for word in words.split()
}
_LANGUAGE_OF = {word: names.pop() for word, names in _LANGUAGES_OF_WORD.items() if len(names) == 1}
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str | None:
    """The language of a text, without what it quotes as code.

    Returns:
        A code of two letters for a language of the Latin script with at least 3 function words of its own, and more
        than twice those of any other; `ja` or `zh` by the presence of kana; the name of another script, such as
        `cyrillic`; None where that does not decide, and for texts of fewer than 20 letters.
    """
    prose = _CODE.sub(" ", text)
    scripts = Counter(_script(character) for character in prose if character.isalpha())
    if scripts.total() < MIN_LETTERS:
        return None
    script, letters = scripts.most_common(1)[0]
    if scripts["hiragana"] + scripts["katakana"] > 0.1 * scripts.total():
        return "ja"
    if 2 * letters <= scripts.total():
        return None
    if script == "cjk":
        return "zh"
    return _latin_language(prose) if script == "latin" else script


def _script(letter: str) -> str:
    return unicodedata.name(letter, "unknown").partition(" ")[0].lower()


def _latin_language(text: str) -> str | None:
    words = Counter(_LANGUAGE_OF[word] for word in _WORD.findall(text.lower()) if word in _LANGUAGE_OF)
    ranked = words.most_common(2)
    if not ranked or ranked[0][1] < MIN_WORDS:
        return None
    if len(ranked) == 2 and ranked[0][1] <= 2 * ranked[1][1]:
        return None
    return ranked[0][0]
