"""Hypothesis strategies of almost valid bytes and texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

_SPECIAL = (b"\x00", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\x02cos\nsystem\n", b"../../../", b"")


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw `whole` with one to four changes: flipped bits, and deleted, inserted or repeated parts."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from((1, 2, 4, 16, 300)))
        match draw(st.sampled_from(("flip", "cut", "insert", "repeat", "end"))):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[place : place + length]
            case "insert":
                content[place:place] = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(_SPECIAL)))
            case "repeat":
                content[place:place] = content[place : place + length]
            case _:
                del content[place:]
    return bytes(content)


def mutated_text(whole: str, words: Sequence[str]) -> st.SearchStrategy[bytes]:
    """Draw the bytes of `whole` mutated, or with one of `words` in a line, or of any text."""
    lines = whole.splitlines()

    def replace(number: int, word: str, form: Callable[[str, str], str]) -> bytes:
        changed = list(lines)
        changed[number] = form(changed[number], word)
        return "\n".join(changed).encode("utf-8", "surrogatepass")

    forms: tuple[Callable[[str, str], str], ...] = (
        lambda line, word: f"{line.partition(':')[0]}: {word}",
        lambda line, word: f"{line}\n{word}",
        lambda line, word: line.replace(":", f"{word}:", 1),
    )
    replaced = st.builds(replace, st.integers(0, len(lines) - 1), st.sampled_from(words), st.sampled_from(forms))
    return st.one_of(
        mutated(whole.encode()), replaced, st.text(max_size=80).map(lambda text: text.encode(errors="replace"))
    )
