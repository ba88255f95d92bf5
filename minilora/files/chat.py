"""How a conversation becomes one text: by templates that are known, never by ones that are run.

A template in a file is a program in Jinja.  Programs of strangers are not evaluated here: a
template is recognized by its exact text, and the few that are known are written out below.
"""

from collections.abc import Mapping, Sequence

from ..engine.errors import FormatError, MiniloraError
from .untrusted import short

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Segment = tuple[str, str]  # "control", "header" or the role of who wrote it; and the text
ROLES = ("system", "user", "assistant")

_TURNS = (
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_FOR = "{% for message in messages %}"
_DEFAULT = (
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{% endif %}"
)


def chatml(system: str | None) -> str:
    """The template of ChatML, with what is said first unless the messages say it."""
    return _FOR + ("" if system is None else _DEFAULT.replace("SYSTEM", system)) + _TURNS


SYSTEMS = {  # the system message that a known template adds
    chatml(system): system
    for system in (
        None,
        "You are a helpful assistant.",  # Qwen2
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face",  # SmolLM2
    )
}
CHATML = chatml(None)


def expect_known(template: str | None) -> None:
    """Errors: `FormatError` for no template, or one that is not known."""
    if template is None:
        raise FormatError("chat: this model has no chat template; give a plain prompt")
    if normal(template) not in SYSTEMS:
        raise FormatError(
            "chat: this template is not one of the known ones, and templates are not "
            f"evaluated: {short(template)}"
        )


def normal(template: str) -> str:
    """A template with each line end as the two characters \\n: files have them both ways."""
    return template.replace("\n", "\\n")


def segments(template: str | None, messages: Sequence[Message], reply: bool) -> list[Segment]:
    """The text of a conversation, cut where who wrote it changes.

    With `reply`, the end is where the assistant begins to speak.  Control tokens are segments
    of their own, so that a message that contains their text is still a message.
    Errors: `FormatError` as `expect_known`; `MiniloraError` for messages of another form.
    """
    expect_known(template)
    expect_messages(messages)
    system = SYSTEMS[normal(template)]
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    parts: list[Segment] = []
    for message in messages:
        role = message["role"]
        parts += [("control", "<|im_start|>"), ("header", f"{role}\n")]
        # The end of a turn belongs to who speaks: a model has to learn to stop.
        parts += [(role, message["content"]), (f"{role} end", "<|im_end|>"), ("header", "\n")]
    if reply:
        parts += [("control", "<|im_start|>"), ("header", "assistant\n")]
    return parts


def render(template: str | None, messages: Sequence[Message], reply: bool = True) -> str:
    """The whole text, as the template would write it."""
    return "".join(text for _, text in segments(template, messages, reply))


def expect_messages(messages: Sequence[Message]) -> None:
    if not isinstance(messages, Sequence):
        raise MiniloraError(f"messages: expected a list, found {short(messages)}")
    if not messages:
        raise MiniloraError("messages: expected at least one, found none")
    for i, message in enumerate(messages):
        fields = dict(message) if isinstance(message, Mapping) else {}
        if fields.get("role") not in ROLES or type(fields.get("content")) is not str:
            raise MiniloraError(
                f"messages: expected {{role: one of {', '.join(ROLES)}, content: text}}, "
                f"found {short(message)} at {i}"
            )
