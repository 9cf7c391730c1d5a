"""Chat templates render in a bounded process: each yields a text, or one sentence of error that names its file."""

import datetime
import os
import pickle
import signal
import threading

import pytest

from puzzle_jax.errors import CheckpointError
from puzzle_jax.tasks.chat import rendering
from puzzle_jax.tasks.chat.rendering import Template

TODAY = datetime.datetime(2026, 3, 4, 5, 6, 7)
MESSAGES = [{"role": "user", "content": "hi"}]


def template(source, **tokens) -> Template:
    return Template(source, "some/chat_template.jinja", TODAY, tokens)


def render(source, **variables) -> str:
    return template(source).render(**{"messages": MESSAGES, **variables})


@pytest.fixture
def service(monkeypatch):
    """A service for this test alone, whose process ends with the test."""
    service = rendering._Service()
    monkeypatch.setattr(rendering, "_SERVICE", service)
    yield service
    service.close()


def told(source: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        render(source)
    message = str(caught.value)
    assert message.startswith("the chat template some/chat_template.jinja ") and "\n" not in message
    return message.removeprefix("the chat template some/chat_template.jinja ")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0].content }}", "hi"),
        ("  {% if true %}\n x\n  {% endif %}\ny", " x\ny"),
        ("{% generation %}a{{ messages[0].content }}{% endgeneration %}b", "ahib"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ {'b': '<é>', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true) }}", '{"a": 1, "b": "<\\u00e9>"}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{{ {'a': 1, 'b': 2} | tojson(separators=(',', ':')) }}", '{"a":1,"b":2}'),
        ("{{ strftime_now('%d %b %Y %H:%M:%S') }}", "04 Mar 2026 05:06:07"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ namespace(self=3).self }}{{ dict(a=1).a }}{{ dict.fromkeys(['k'], 2).k }}", "312"),
        ("{{ tools is none }}{{ nothing is defined }}{{ nothing }}", "TrueFalse"),
    ],
)
def test_what_templates_render(source, text):
    assert render(source, tools=None) == text


def test_special_tokens_are_variables_and_arguments_go_before_them():
    both = template("{{ bos_token }}{{ x }}", bos_token="<s>", x="no")
    assert both.render(x="yes") == "<s>yes"
    assert pickle.loads(pickle.dumps(both)).render(x="again") == "<s>again"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 1 / 0 }}", "cannot be rendered: ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "cannot be rendered: TypeError: unsupported operand"),
        ("{{ [1] | sum(start='a') }}", "cannot be rendered: TypeError"),
        ("{{ messages[0].nothing.more }}", "cannot be rendered: UndefinedError: 'dict object' has no attribute"),
        ("{{ messages + tools.first }}", "cannot be rendered: UndefinedError"),
        ("{{ 'a'.encode('nothing') }}", "cannot be rendered: LookupError"),
        ("{{ 10 ** 5000 }}", "cannot be rendered: ValueError: Exceeds the limit"),
        ("{{ 10.0 ** 500 }}", "cannot be rendered: OverflowError"),
        ("{{ range(10 ** 9) }}", "cannot be rendered: OverflowError: Range too big"),
        ("{% include 'x' %}", "cannot be rendered: TypeError: no loader"),
        ("{% break %}", "cannot be rendered: SyntaxError: 'break' outside loop"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it is nested too deeply, or calls itself without end"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "it is nested too deeply, or calls itself without end"),
        ("{{ ().__class__.__mro__ }}", "cannot be rendered: SecurityError"),
        ("{{ messages.append(1) }}", "cannot be rendered: SecurityError"),
        ("{{ namespace(_x=1) }}", "cannot be rendered: SecurityError"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "cannot be rendered: SecurityError"),
        ("{{ '\\ud83d' }}", "cannot be rendered: it writes half a surrogate pair"),
        ("{{ raise_exception('no\nsystem role') }}", "refused the conversation: no system role"),
        ("a\n{% if %}", "is no valid Jinja: .*(line 2)"),
        ("{{ 1 | nothing }}", "is no valid Jinja: No filter named 'nothing'. (line 1)"),
        ("{% generation %}", "is no valid Jinja"),
        ("{{ raise_exception('a' * 1000) }}", "refused the conversation: aaa"),
    ],
)
def test_any_error_is_one_sentence(source, message):
    said = told(source)
    head, _, tail = message.partition(".*")
    assert said.startswith(head) or head in said
    assert said.endswith(tail) if tail else len(said) < 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'a\na' | indent(10 ** 10) }}",
        "{{ [1] | batch(10 ** 10, 0) | list }}",
        "{% set n = namespace(x='abcdefgh') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=['ab']) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(9) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
        "{{ '%.9999999999f' % 1 }}{{ '{:9999999999}'.format(1) }}",
    ],
)
def test_memory_is_bounded(monkeypatch, service, source):
    monkeypatch.setattr(rendering, "RENDER_BYTES", 1 << 28)
    said = told(source)
    # CPython itself bounds the width of some formats.
    assert "it takes more memory than a rendering may" in said or "ValueError" in said or "OverflowError" in said
    assert render("{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (9 ** (9 ** 9)) % 10 }}",
        "{{ lipsum(10 ** 9) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    ],
)
def test_time_is_bounded(monkeypatch, service, source):
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    assert told(source) == "cannot be rendered: it takes more than 0.5 s of processor time"
    assert render("{{ 1 + 1 }}") == "2"


def test_text_is_bounded(monkeypatch, service):
    monkeypatch.setattr(rendering, "LONGEST_TEXT", 1000)
    assert render("{{ 'a' * 1000 }}") == "a" * 1000
    assert told("{{ 'ä' * 501 }}") == "renders more than 1000 bytes of text"


def test_one_process_renders_many_and_a_new_one_starts_where_it_is_gone(service):
    ours, other = template("{{ x }}"), template("{{ x }}!")
    assert [ours.render(x=i) + other.render(x=i) for i in range(3)] == ["00!", "11!", "22!"]
    first = service._process
    ours.render(x=4)
    assert service._process is first
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert ours.render(x=5) + other.render(x=5) == "55!"
    assert service._process is not first


def test_threads_get_their_own_texts(service):
    wrong = []

    def ask(thread):
        for i in range(50):
            if template("{{ x }}").render(x=f"{thread}.{i}") != f"{thread}.{i}":
                wrong.append((thread, i))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fork_starts_a_process_of_its_own(service):
    ours = template("{{ x }}")
    ours.render(x=0)
    assert service._owner == os.getpid()
    service._owner = -1  # as in a fork
    first, channel = service._process, service._channel
    assert ours.render(x=1) == "1"
    assert service._process is not first
    channel.close()
    first.wait(20)  # It ends when its channel is closed.


def test_long_conversations_pass(service):
    text = "äöü🙂" * 200_000
    assert render("{{ messages[0].content }}{{ messages | length }}", messages=[{"content": text}] * 2) == text + "2"
