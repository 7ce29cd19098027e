"""`dist-train completion`: a script that completes commands, options, choices and settings in bash and zsh."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from pydantic import BaseModel

from dist_train.cli.common import Subparsers
from dist_train.config import Config
from dist_train.config.problems import choices_in, is_collection, models_of
from dist_train.outcome import ExitCode

_SCRIPT = """\
_dist_train() {
  local cur="${COMP_WORDS[COMP_CWORD]}" at='' prev='' word words='' options='' settings='' value='' prefix=''
  local every='%(every)s'
  for word in "${COMP_WORDS[@]:1:$COMP_CWORD-1}"; do
    case "$at:$word" in
%(commands)s
    esac
    # bash takes noise.method=sam for three words, zsh for one
    if [ "$word" = = ]; then value="$prev"; else value=''; fi
    prev="$word"
  done
  case "$cur" in
    =) value="$prev" cur='' ;;
    *=*) value="${cur%%%%=*}" prefix="${cur%%%%=*}=" cur="${cur#*=}" ;;
  esac
  if [ -n "$value" ]; then
    case "$value" in
%(values)s
    esac
  else
    case "$at:$prev" in
%(choices)s
      *) case "$at" in
%(words)s
      esac ;;
    esac
    case "$cur" in
      -*) words="$options" ;;
      ?*) words="$words $settings" ;;
    esac
  fi
  # shellcheck disable=SC2207 # none of these words holds a blank
  COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$cur"))
  # bash itself offers files only beside no words
  if [ -n "$settings" ] && [ -z "$value" ] && [ -n "${COMPREPLY[*]}" ]; then
    while IFS= read -r word; do
      if [ -d "$word" ]; then word="$word/"; fi
      COMPREPLY+=("$(printf %%q "$word")")
    done < <(compgen -f -- "$cur")
  fi
  case "${COMPREPLY[*]}" in *=|*/) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _dist_train dist-train
"""
_FOR_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def _add_completion(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "completion",
        help="print a script that completes commands, options and settings in bash or zsh",
        description='Print a script for the shell; in ~/.bashrc: eval "$(dist-train completion bash)".',
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=_completion)


def _completion(arguments: argparse.Namespace) -> int:
    from dist_train.cli.main import build_parser

    print((_FOR_ZSH if arguments.shell == "zsh" else "") + completion_script(build_parser()), end="")
    return ExitCode.FINISHED


def completion_script(parser: argparse.ArgumentParser) -> str:
    """Return the bash script that completes the commands of `parser`."""
    settings = choices_by_setting(Config)
    nodes = list(_nodes(parser, ""))
    commands, choices, words = [], [], []
    for name, node in nodes:
        positional, takes_settings = "", False
        options: list[str] = []
        for action in node._actions:
            allowed = " ".join(map(str, action.choices or ()))
            if action.nargs == argparse.REMAINDER:  # another command
                allowed = " ".join(inner for inner, _ in nodes if inner and "/" not in inner)
            if action.nargs in (argparse.REMAINDER, argparse.PARSER):
                prefix = f"{name}/" if name and action.nargs == argparse.PARSER else ""
                commands += [f'{name}:{word}) at="{prefix}{word}"' for word in allowed.split()]
            if not action.option_strings:
                positional = f"{positional} {allowed}".strip()
            elif action.nargs != 0:
                choices.append(f"{'|'.join(f'{name}:{each}' for each in action.option_strings)}) words='{allowed}'")
            options += action.option_strings
            takes_settings = takes_settings or action.dest == "overrides"
        settings_variable = ' settings="$every"' if takes_settings else ""
        words.append(f"'{name}') words='{positional}' options='{' '.join(options)}'{settings_variable}")
    values = [f"{path}) words='{' '.join(allowed)}'" for path, allowed in settings.items() if allowed]
    cases = {"commands": commands, "choices": choices, "words": words, "values": values}
    parts = {name: "\n".join(f"      {line} ;;" for line in lines) for name, lines in cases.items()}
    return _SCRIPT % {**parts, "every": " ".join(f"{path}=" for path in settings)}


def choices_by_setting(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Return the choices, if any, of each setting of `model`, by path; of the kinds of a union, those of all."""
    found: dict[str, list[str]] = {}
    for name, field in model.model_fields.items():
        path, models = f"{prefix}{name}", models_of(field)
        if not models or is_collection(field):
            found[path] = list(choices_in(field.annotation))
            continue
        for inner in models:
            for setting, choices in choices_by_setting(inner, f"{path}.").items():
                found.setdefault(setting, []).extend(choices)
    return found


def _nodes(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield `parser` and the parsers of its commands, each with its command path, such as `config/check`."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from _nodes(inner, f"{name}/{word}" if name else word)


COMMANDS = (_add_completion,)
