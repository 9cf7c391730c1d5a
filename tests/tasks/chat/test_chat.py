"""Chat rendering and parsing with the embedded tokenizer, and what is refused."""

import datetime
import json
import pickle
import shutil

import pytest
import tokenizers

from puzzle_jax.errors import CheckpointError, PuzzleError, PuzzleWarning
from puzzle_jax.tasks import EFFORTS, TASKS, Chat
from puzzle_jax.tasks.chat.embedded import CHARACTERS, HARMONY, VOCAB_SIZE, write_chat_files

PROMPT_HIGH = "<|start|>system<|message|>Reasoning: high<|end|><|start|>user<|message|>mod 7+5<|end|><|start|>assistant"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat")
    write_chat_files(directory)
    return directory


@pytest.fixture(scope="module")
def chat(directory):
    return Chat.load(directory)


def test_vocabulary_fits_its_padded_size(chat):
    used = len(HARMONY.tokens)
    assert chat.tokenizer.get_vocab_size() == used == 114
    assert used <= VOCAB_SIZE and VOCAB_SIZE % 32 == 0


def test_prompt_is_harmony_with_one_token_per_piece(chat):
    tokens = chat.prompt_tokens("mod 7+5", "high")
    assert chat.decode(tokens) == PROMPT_HIGH
    assert len(tokens) == 6 + 3 + len("mod 7+5") + 1 + 2
    assert chat.decode(chat.prompt_tokens("mod 7+5")) == PROMPT_HIGH.replace("high", "medium")


def test_every_character_survives_the_round_trip(chat):
    text = "  a  b\n\tlow" + CHARACTERS + "Reasoning: high analysis"
    assert chat.decode(chat.encode(text.replace("\t", ""))) == text.replace("\t", "")
    assert chat.decode(chat.encode("ü")) == "<|unknown|>"


def test_completion_has_an_analysis_message_only_when_there_is_one(chat):
    both = chat.completion_tokens("7+5=2", "2")
    assert chat.decode(both) == (
        "<|channel|>analysis<|message|>7+5=2<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>"
    )
    assert len(both) == 3 + 5 + 3 + 3 + 1 + 1
    assert chat.decode(chat.completion_tokens("", "2")) == "<|channel|>final<|message|>2<|return|>"


@pytest.mark.parametrize("analysis", ["", "7+5=2,*3=6"])
def test_parse_inverts_completion(chat, analysis):
    tokens = chat.completion_tokens(analysis, "6")
    completion = chat.parse(tokens)
    assert (completion.analysis, completion.final, completion.truncated) == (analysis, "6", False)
    assert chat.parse([*tokens, *chat.encode("more")]) == completion


def test_parse_of_unfinished_and_odd_answers(chat):
    def parse(text):
        completion = chat.parse(chat.encode(text))
        return completion.analysis, completion.final, completion.truncated

    assert parse("") == ("", "", True)
    assert parse("<|channel|>analysis<|message|>7+5") == ("7+5", "", True)
    assert parse("<|channel|>final<|message|>2") == ("", "2", True)
    assert parse("garbage<|end|><|channel|>final<|message|>2<|return|>") == ("", "2", False)
    assert parse("<|channel|>commentary<|message|>x<|end|><|channel|>final<|message|>2<|call|>") == (
        "",
        "2",
        False,
    )
    assert parse("<|message|>2<|channel|>final<|return|>")[1:] == ("", False)
    assert parse("<|channel|>final extra<|message|>2<|endoftext|>") == ("", "2", False)


@pytest.mark.parametrize(
    ("text", "analysis", "final", "truncated"),
    [
        ("<|channel|>analysis<|message|>7+5<|return|>", "7+5", "", False),
        ("<|channel|>analysis<|message|>7+5<|end|><|start|>assistant", "7+5", "", True),
        ("<|channel|>analysis<|message|>a<|end|><|channel|>commentary to=f<|message|>{}<|call|>", "a", "", False),
        ("<|channel|>analysis to=python<|message|>7+5<|call|>", "", "", False),
        (" to=functions.final<|channel|>final<|message|>{}<|call|>", "", "", False),
        ("<|channel|>final constrain json<|message|>{}<|return|>", "", "{}", False),
        ("<|message|>2<|return|>", "", "", False),
        ("<|channel|><|message|>2<|return|>", "", "", False),
        ("<|channel|>final<|return|>", "", "", False),
        ("<|channel|>finally<|message|>2<|return|>", "", "", False),
        ("<|channel|>final<|message|>2<|end|><|channel|>final<|message|>3<|return|>", "", "2\n3", False),
        ("<|return|><|channel|>final<|message|>2<|return|>", "", "", False),
    ],
)  # fmt: skip
def test_what_counts_as_analysis_and_final(chat, text, analysis, final, truncated):
    completion = chat.parse(chat.encode(text))
    assert (completion.analysis, completion.final, completion.truncated) == (analysis, final, truncated)


def test_a_cut_answer_has_no_stop_id_and_parses_as_truncated(chat):
    assert chat.decode(chat.completion_tokens("7+5", "", cut=True)) == "<|channel|>analysis<|message|>7+5"
    assert chat.completion_tokens("7+5", "2", cut=True) == chat.completion_tokens("7+5", "2")[:-1]
    assert chat.completion_tokens("", "", cut=True) == []
    for analysis, final in (("7+5", ""), ("7+5", "2"), ("", "2")):
        completion = chat.parse(chat.completion_tokens(analysis, final, cut=True))
        assert (completion.analysis, completion.final, completion.truncated) == (analysis, final, True)


def test_history_keeps_final_answers_and_drops_what_was_thought(chat):
    messages = [
        {"role": "user", "content": "mod 7+5"},
        {"role": "assistant", "content": "2", "thinking": "7+5=2"},
        {"role": "user", "content": "mod 1+1"},
    ]
    assert chat.decode(chat.prompt_tokens(messages, "high")) == PROMPT_HIGH.replace(
        "<|start|>assistant",
        "<|start|>assistant<|channel|>final<|message|>2<|end|><|start|>user<|message|>mod 1+1<|end|><|start|>assistant",
    )
    assert chat.prompt_tokens(messages[:1]) == chat.prompt_tokens("mod 7+5")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation has no message"),
        ([{"content": "x"}], "message 1: role is None, but must be a text"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "message 2: content is None"),
        ([{"role": "tool", "content": "x"}], "role is tool, but must be user or assistant"),
    ],
)
def test_odd_conversations_are_refused(chat, messages, message):
    with pytest.raises(PuzzleError, match=message):
        chat.prompt_tokens(messages)


def test_stop_and_pad_ids_come_from_the_generation_config(chat):
    assert chat.stop_ids == {chat.tokenizer.token_to_id(t) for t in ("<|return|>", "<|endoftext|>", "<|call|>")}
    assert chat.pad_id == chat.tokenizer.token_to_id("<|endoftext|>") == 0


def test_characters_of_prompts_are_tokens(chat):
    for task in TASKS.values():
        for seed in range(100):
            prompt = task.sample(seed).prompt
            assert len(chat.encode(prompt)) == len(prompt)


def test_unknown_effort_is_refused(chat):
    with pytest.raises(PuzzleError, match="effort is 'extreme', but must be one of low, medium, high"):
        chat.prompt_tokens("mod 7+5", "extreme")


def damaged(directory, tmp_path, name, change):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    path = copy / name
    text = change(path.read_text())
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode(errors="surrogateescape"))
    if name == "tokenizer_config.json":
        (copy / "special_tokens_map.json").unlink()
    return copy


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "tokenizer.json",
            lambda _: None,
            "tokenizer.json does not exist, but a checkpoint must carry its tokenizer",
        ),
        ("tokenizer.json", lambda text: text[:200], "tokenizer.json is no valid tokenizer"),
        ("tokenizer.json", lambda text: text.replace("<|channel|>", "<|chan|>"), "has no token <|channel|>"),
        ("chat_template.jinja", lambda _: None, "chat_template.jinja does not exist"),
        ("chat_template.jinja", lambda _: "{{ messages }}", "never uses reasoning_effort"),
        ("chat_template.jinja", lambda text: text + "{% if %}", "chat_template.jinja is no valid Jinja: .* (line 17)"),
        ("chat_template.jinja", lambda text: text.replace("e", "\udcff", 1), "chat_template.jinja is not valid UTF-8"),
        ("generation_config.json", lambda _: "{", "generation_config.json cannot be read as JSON"),
        ("generation_config.json", lambda _: "[]", "generation_config.json holds list, but must hold an object"),
        ("generation_config.json", lambda _: "[" * 100_000, "generation_config.json is nested too deeply"),
        ("generation_config.json", lambda _: f'{{"a": 1{"0" * 5000}}}', "holds a whole number of thousands of digits"),
        *(
            (
                "generation_config.json",
                lambda text, name=name, value=value: json.dumps({**json.loads(text), name: value}),
                f"generation_config.json: {name} is {told}, but must be a token id from 0 to 113",
            )
            for name, value, told in (
                ("eos_token_id", "1", "'1'"),
                ("eos_token_id", [1, 114], r"\[1, 114\]"),
                ("eos_token_id", True, "True"),
                ("eos_token_id", -1, "-1"),
                ("eos_token_id", [[1]], r"\[\[1\]\]"),
                ("pad_token_id", "a", "'a'"),
                ("pad_token_id", [1], r"\[1\]"),
                ("pad_token_id", 1.0, "1.0"),
                ("bos_token_id", 10**30, f"1{'0' * 30}"),
            )
        ),
        ("tokenizer_config.json", lambda _: '{"eos_token": 3}', "tokenizer_config.json: eos_token is 3, but must be a"),
        (
            "tokenizer_config.json",
            lambda _: '{"added_tokens_decoder": {"0": "a"}}',
            r"tokenizer_config\.json: added_tokens_decoder.* is a text, but must be an object",
        ),
    ],
)
def test_damaged_files_are_named(directory, tmp_path, name, change, message):
    message = message.replace("|", r"\|").replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(CheckpointError, match=message):
        Chat.load(damaged(directory, tmp_path, name, change)).prompt_tokens("mod 7+5")


def test_template_may_live_in_the_tokenizer_config(directory, tmp_path):
    copy = damaged(directory, tmp_path, "chat_template.jinja", lambda _: None)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["chat_template"] = (directory / "chat_template.jinja").read_text()
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    chat = Chat.load(copy)
    assert chat.decode(chat.prompt_tokens("mod 7+5", "high")) == PROMPT_HIGH


def test_template_functions_of_real_templates(directory, tmp_path):
    template = (
        "{{ strftime_now('%Y-%m-%d') }} {{ {'a': '<b>'} | tojson }} {{ reasoning_effort }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}"
    )
    copy = damaged(directory, tmp_path, "chat_template.jinja", lambda _: template)
    chat = Chat.load(copy, today=datetime.datetime(2026, 3, 4))
    assert chat.decode(chat.prompt_tokens("x", "low")) == '2026-03-04 {"a": "<b>"} low'
    refusing = damaged(
        directory, tmp_path / "b", "chat_template.jinja", lambda _: "{{ raise_exception(reasoning_effort) }}"
    )
    with pytest.raises(CheckpointError, match=r"template .*/b/copy/chat_template\.jinja refused the conversation: low"):
        Chat.load(refusing).prompt_tokens("x", "low")


def edited(directory, tmp_path, **files):
    """Copies the directory and updates its JSON files; None removes a key."""
    copy = tmp_path / "edited"
    shutil.copytree(directory, copy)
    for name, changes in files.items():
        path = copy / f"{name}.json"
        content = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return copy


@pytest.mark.parametrize(
    ("files", "said", "pad"),
    [
        ({"generation_config": {"eos_token_id": 0}}, r"generation_config.json: eos_token_id is 0, which lacks", 0),
        ({"generation_config": {"eos_token_id": [0, 1]}}, r"is \[0, 1\], which lacks <\|call\|>, where", 0),
        ({"generation_config": {"eos_token_id": None, "pad_token_id": None}}, "eos_token_id is not there; it lacks", 1),
        (
            {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 1, "vocab_size": 128}},
            r"config.json: eos_token_id is 1, which lacks <\|call\|>",
            0,
        ),
    ],
)
def test_the_ends_of_the_format_end_answers_though_the_checkpoint_does_not_name_them(
    directory, tmp_path, files, said, pad
):
    with pytest.warns(PuzzleWarning, match=said) as told:
        chat = Chat.load(edited(directory, tmp_path, **files))
    assert len(told) == 1 and "\n" not in str(told[0].message)
    ends = {chat.tokenizer.token_to_id(token) for token in ("<|return|>", "<|call|>")}
    assert ends <= chat.stop_ids <= ends | {0} and chat.pad_id == pad
    assert not chat.parse(chat.completion_tokens("7+5=2", "2")).truncated


def test_ids_up_to_the_models_vocabulary_are_allowed(directory, tmp_path):
    copy = edited(directory, tmp_path, config={"vocab_size": 128}, generation_config={"pad_token_id": 127})
    assert Chat.load(copy).pad_id == 127
    (copy / "generation_config.json").write_text('{"eos_token_id": 1, "pad_token_id": 128}')
    with pytest.raises(CheckpointError, match="pad_token_id is 128, but must be a token id from 0 to 127"):
        Chat.load(copy)


@pytest.mark.parametrize("saved", ["truncation", "padding"])
def test_truncation_and_padding_that_training_left_are_off(directory, tmp_path, chat, saved):
    copy = edited(directory, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    if saved == "truncation":
        tokenizer.enable_truncation(max_length=4)
    else:
        tokenizer.enable_padding(length=64, pad_id=0, pad_token="<|endoftext|>")
    tokenizer.save(str(copy / "tokenizer.json"))
    ours = Chat.load(copy)
    assert ours.prompt_tokens("mod 7+5", "high") == chat.prompt_tokens("mod 7+5", "high")
    assert ours.completion_tokens("7+5=2", "2") == chat.completion_tokens("7+5=2", "2")


def test_of_named_templates_the_default_is_rendered(directory, tmp_path):
    default = (directory / "chat_template.jinja").read_text()
    named = [{"name": "tool_use", "template": "{{ reasoning_effort }}"}, {"name": "default", "template": default}]
    copy = edited(directory, tmp_path, tokenizer_config={"chat_template": named})
    (copy / "chat_template.jinja").unlink()
    assert Chat.load(copy).decode(Chat.load(copy).prompt_tokens("mod 7+5", "high")) == PROMPT_HIGH
    edited(copy, tmp_path / "b", tokenizer_config={"chat_template": named[:1]})
    with pytest.raises(CheckpointError, match="has the chat templates tool_use, but none that is called default"):
        Chat.load(tmp_path / "b" / "edited")
    # Files take precedence over the configuration.
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "default.jinja").write_text("{{ bos_token }}{{ reasoning_effort }}")
    assert Chat.load(copy).decode(Chat.load(copy).prompt_tokens("x", "low")) == "low"
    edited(copy, tmp_path / "c", special_tokens_map={"bos_token": "<|start|>"})
    chat = Chat.load(tmp_path / "c" / "edited")
    assert chat.prompt_tokens("x", "low") == [chat.tokenizer.token_to_id(token) for token in ("<|start|>", "low")]
    edited(copy, tmp_path / "d", special_tokens_map={"bos_token": "<s>"})
    with pytest.raises(CheckpointError, match="writes bos_token, which is '<s>' in the configuration"):
        Chat.load(tmp_path / "d" / "edited")


def test_a_chat_survives_pickling(chat):
    chat.prompt_tokens("mod 7+5")
    again = pickle.loads(pickle.dumps(chat))
    assert again.prompt_tokens("mod <|end|>", "low") == chat.prompt_tokens("mod <|end|>", "low")
    assert (again.stop_ids, again.pad_id, again.today) == (chat.stop_ids, chat.pad_id, chat.today)


def test_texts_that_are_no_unicode_are_refused(chat):
    with pytest.raises(PuzzleError, match="message 1: content holds half a surrogate pair"):
        chat.prompt_tokens("5 \ud83d")
    with pytest.raises(PuzzleError, match="final text of the answer holds half a surrogate pair"):
        chat.completion_tokens("", "5 \ud83d")


@pytest.mark.parity
def test_transformers_gives_the_same_ids(directory, chat):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for task in TASKS.values():
        prompt = task.sample(1).prompt
        for effort in EFFORTS:
            theirs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                reasoning_effort=effort,
                return_dict=False,
            )
            ours = chat.prompt_tokens(prompt, effort)
            assert theirs == ours
            assert tokenizer.decode(theirs) == chat.decode(ours)
    assert tokenizer.pad_token_id == chat.pad_id
    assert tokenizer.eos_token_id in chat.stop_ids
