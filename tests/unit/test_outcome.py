"""Errors carry codes, which the documentation lists and the program prints."""

from __future__ import annotations

import ast
import errno
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from dist_train.cluster.communicator import RankLostError
from dist_train.outcome import CodedError, FaultError, UsageError, escaped, printable, reading, text_with_code
from tests.raising import raises

ROOT = Path(__file__).parents[2]


def codes_in(path: Path) -> Iterator[str]:
    """Yield the codes that the source at `path` gives errors, as patterns: `code=...`, of a class, or in a table."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.keyword(arg="code", value=ast.Constant(str(code))):
                yield code
            case ast.keyword(arg="code", value=ast.JoinedStr(values)):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "[a-z]+" for part in values)
            case ast.AnnAssign(target=ast.Name("_FAULTS"), value=table) if table is not None:
                for inner in ast.walk(table):
                    match inner:
                        case ast.Tuple(elts=[ast.Constant(str(code)), ast.Constant(str())]):
                            yield code
            case ast.ClassDef(body=body):
                for line in body:
                    match line:
                        case ast.Assign(targets=[ast.Name("code")], value=ast.Constant(str(code))):
                            yield code


def test_the_documentation_lists_every_code_and_no_other() -> None:
    files = [*(ROOT / "dist_train").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    used = set(chain.from_iterable(map(codes_in, files))) - {CodedError.code}
    listed = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.M)
    assert len(set(listed)) == len(listed)
    assert [pattern for pattern in sorted(used) if not any(re.fullmatch(pattern, code) for code in listed)] == []
    assert [code for code in listed if not any(re.fullmatch(pattern, code) for pattern in used)] == []


def test_every_refusal_of_the_program_has_a_code_of_its_own() -> None:
    for path in (ROOT / "dist_train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name("UsageError" | "FaultError"), keywords=keywords)):
                    assert "code" in [keyword.arg for keyword in keywords], f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UsageError("wrong"), "wrong"),
        (FaultError("broken", code="disk-failed"), "broken [disk-failed]"),
        (RankLostError("gone"), "gone [rank-lost]"),
    ],
)
def test_a_code_is_printed_where_it_says_more_than_the_exit_code(error: CodedError, text: str) -> None:
    assert text_with_code(error) == text
    assert text_with_code(pickle.loads(pickle.dumps(error))) == text


def test_a_text_does_nothing_to_a_terminal() -> None:
    text = "\x1b]0;title\x07 \0 \x9b31m \r\n \u202e \udcff"
    assert escaped(text) == r"\x1b]0;title\x07 \x00 \x9b31m \r\n \u202e \udcff"
    assert escaped("Größe 8 µm, 図") == "Größe 8 µm, 図"
    assert printable("one\n  two\x1b[2J") == "one\n  two\\x1b[2J"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://user:pass@host:9091/x", "at http://***@host:9091/x"),
        ("at https://t0ken@host", "at https://***@host"),
        ("at http://user:p/a:ss@host", "at http://***@host"),
        ("at user:pass@host:9091", "at ***@host:9091"),
        ("at https://host/x?token=secret&a=b", "at https://host/x?***"),
        ("rank 0: a@b, http://host:9091", "rank 0: a@b, http://host:9091"),
    ],
)
def test_a_message_shows_no_password(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, FaultError), (errno.ESTALE, FaultError), (errno.EACCES, UsageError), (errno.ENOENT, UsageError)],
)
def test_a_disk_that_fails_is_no_mistake_of_the_user(number: int, kind: type[CodedError]) -> None:
    with raises(kind, "data-unreadable"), reading(Path("images")):
        raise OSError(number, os.strerror(number))


def test_messages_of_several_ranks_do_not_mix_in_a_line() -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps each write apart
    with ours, its:
        program = "from dist_train.outcome import say_on_stderr; say_on_stderr('one'); say_on_stderr('two')"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        subprocess.run([sys.executable, "-c", program], stderr=its.fileno(), env=environment, check=True)
        assert [ours.recv(100) for _ in range(2)] == [b"one\n", b"two\n"]
