"""Texts that tell a right tokenizer from an almost right one."""

import random
import unicodedata

WRITTEN = (
    "",
    " ",
    "a",
    "Hello, world! It's the dog's; they'll've WON'T I'M",
    "  leading and trailing  ",
    "one\ntwo\n\nthree\r\n\r\nfour\n\n\n\n\n",
    "tab\tand\t\ttabs\t\t\t\t\tend",
    " " * 3 + "a" + " " * 17 + "b" + " " * 31 + "c",
    "\n" * 9 + " \n \n\t \n" + "\u00a0\u2003\u3000x\u200b",
    "0 1 12 123 1234 12345 123456789 3.14159 1e-10 ²³¹ ½ ٣٤٥ १२३ Ⅷ ⑦ 一二三",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # comment\n\n\nclass A(B):\n\tpass\n',
    '<html><body class="x">&amp; <b>bold</b></body></html>',
    '{"a": [1, 2, {"b": null}], "c": "\\u00e9\\n"}',
    "SELECT * FROM t WHERE a<>'b' -- ok?!...;;; $#@%^&*()_+=~`|\\/",
    "Schöne Grüße aus Köln, señor, où êtes-vous? Þórður, naïve café, ŁÓDŹ, İstanbul ıi",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Їжак",
    "Ταχίστη αλώπηξ βαφής ψημένη γη, δρασκελίζει",
    "敏捷的棕色狐狸跳过懒狗。今天天气很好，我们去公园吧！「引用」",
    "吾輩は猫である。名前はまだ無い。カタカナとひらがな、漢字ｶﾅ",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. 한글",
    "أبجد هوز حطي كلمن، السَّلَامُ عَلَيْكُمْ",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה, שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। क्षत्रिय",
    "นายสังฆภัณฑ์ เฮงพิทักษ์ฝั่ง ผู้เฒ่าซึ่งมีอาชีพเป็นฅนขายฃวด",
    "Tiếng Việt có nhiều dấu: ặ ẫ ữ ợ ỵ",
    "ტყავი გინახავს? Հայերեն ամһարኛ አማርኛ ខ្មែរ བོད་ မြန်မာ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵🇺🇳 👍🏽 🤦🏿‍♀️ ❤️ ☃ 🧑‍🚀🫠 1️⃣",
    "e\u0301 o\u0308\u0323 \u0041\u030a Z\u0351\u036b\u0343a\u030d\u0302l\u0310g\u0301o \ufb01\ufb02 Ａｂｃ ℌ ①",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈𐌰 𒀀 \U0010ffff \U000e0041 \ue000 \ufeff \ufffd \x00\x01\x7f\x85",
    "▁ ▁▁ ▁a a▁b Ġ Ċ <0x0A> <0xE4> ## @@",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa " * 3,
    "!!!???...,,,;;;---___===+++***\"\"\"'''((([[[{{{",
    "https://example.com/a/b?c=d&e=f#g user.name+tag@mail.example.org C:\\Users\\x",
    "ThisIsCamelCase and snake_case_words and SCREAMING_CASE mixed123numbers456",
)


def tough_texts(seed: int, specials: tuple[str, ...] = ()) -> list[str]:
    """The written texts, special tokens in the midst of text, and random Unicode that changes with the seed."""
    rng = random.Random(seed)
    texts = list(WRITTEN)
    for special in specials:
        texts += [
            special,
            f"before {special}after",
            f"{special} {special}{special}\n",
            special[:-1],
            f" {special[1:]}x",
        ]
    texts += [_random_text(rng) for _ in range(60)]
    texts += ["".join(rng.choice(WRITTEN)[:20] for _ in range(5)) for _ in range(40)]
    return texts


def _random_text(rng: random.Random) -> str:
    start = rng.choice(
        (0x20, 0x80, 0x370, 0x5D0, 0x900, 0xE00, 0x1E00, 0x2000, 0x3040, 0x4E00, 0xAC00, 0x1F300)
    )
    characters = [chr(start + rng.randrange(200)) for _ in range(rng.randrange(1, 30))]
    characters += [chr(rng.randrange(0x110000)) for _ in range(rng.randrange(4))]
    characters += rng.choices(" \n\t.,1a", k=rng.randrange(8))
    rng.shuffle(characters)
    return "".join(c for c in characters if unicodedata.category(c) != "Cs")
