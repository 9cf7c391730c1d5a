"""Chat templates written for these tests, each with features that some family of published templates relies on."""
# ruff: noqa: E501

HEADERS = """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\nEffort: " + reasoning_effort + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("one tool call at a time") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

IM = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + reasoning_effort }}{% endif %}"
)

IM_DEFAULT_SYSTEM = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system
You are helpful at {{ reasoning_effort }} effort.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}{% if not loop.last or add_generation_prompt %}<|im_end|>
{% endif %}{% endfor %}
{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}<|im_start|>assistant
{% endif %}
"""

LAST_QUERY = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
                {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if reasoning_effort is defined and reasoning_effort == 'low' %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

ALTERNATING = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}\
{% else %}{{ raise_exception('Only user and assistant roles are supported, at ' ~ reasoning_effort) }}{% endif %}{% endfor %}
"""

SYSTEM_LAST_TURN = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{#- This block checks for alternating roles, reasoning_effort aside. #}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("must alternate") }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

BAR_ROLES = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}\
{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}\
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<|User|>' + message['content']}}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}{{'<|tool_outputs_end|>' + message['content']}}{%- set ns.is_tool = false -%}\
{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + content + eos_token}}{%- endif %}{%- endif %}\
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}{{'<|tool_outputs_begin|>' + message['content']}}{%- set ns.is_output_first = false %}{%- else %}{{'\\n' + message['content']}}{%- endif %}{%- endif %}\
{%- endfor -%}{% if ns.is_tool %}{{'<|tool_outputs_end|>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|><think>' ~ reasoning_effort ~ '\\n'}}{% endif %}\
"""

TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n' + reasoning_effort}}{% endif %}
"""

FIRST_USER_PREFIX = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception("Conversation roles must alternate") }}{%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' ~ reasoning_effort[0] }}{%- endif -%}
"""

PIPE_ROLES = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{'<|assistant|>\\n' + message['content'] + '<|im_end|>\\n'}}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{{ reasoning_effort }}{% else %}{{ eos_token }}{% endif %}"
)

ROLE_PIECES = "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|im_end|>' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}{{ reasoning_effort }}"

HARMONY = """\
{#- The types of arguments, as the format writes them. -#}
{%- macro render_type(spec) -%}
    {%- if spec.type == "array" -%}{{- render_type(spec['items']) + "[]" }}
    {%- elif spec.type is iterable and spec.type is not string -%}{{ spec.type | join(" | ") }}
    {%- elif spec.enum -%}{{ '"' + spec.enum | join('" | "') + '"' }}
    {%- else -%}{{ spec.type | default("any") }}{%- endif -%}
{%- endmacro -%}
{%- macro build_system_message() -%}
    {%- if model_identity is not defined %}{%- set model_identity = "You are a model." %}{%- endif %}
    {{- model_identity + "\\n" }}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\\n\\n" }}
    {%- if builtin_tools %}{{- "# Tools\\n\\n" }}{%- endif -%}
    {{- "# Valid channels: analysis, commentary, final." }}
    {%- if tools -%}{{- "\\nCalls go to the commentary channel." }}{%- endif -%}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}{{- build_system_message() }}{{- "<|end|>" }}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}
    {%- set developer_message = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer_message = "" %}{%- set loop_messages = messages %}
{%- endif %}
{%- if developer_message or tools %}
    {{- "<|start|>developer<|message|># Instructions\\n\\n" + developer_message + "\\n\\n" + render_type({"type": "array", "items": {"enum": ["a", "b"]}}) + "<|end|>" }}
{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "content" in message %}{%- if "<|channel|>analysis<|message|>" in message.content or "<|channel|>final<|message|>" in message.content %}
            {{- raise_exception("content holds channel tags, which belong into the thinking field") }}
        {%- endif %}{%- endif %}
        {%- set future_final_message = namespace(found=false) %}
        {%- for future_message in loop_messages[loop.index:] %}
            {%- if future_message.role == 'assistant' and "tool_calls" not in future_message %}{%- set future_final_message.found = true %}{%- endif %}
        {%- endfor %}
        {%- if message.thinking and not future_final_message.found %}{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}{%- endif %}
        {%- if loop.last and not add_generation_prompt %}{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
            {%- set last_tool_call.name = none %}{%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_tool_call.name is none %}{{- raise_exception("a tool message without a call") }}{%- endif %}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""

BODY = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ reasoning_effort }}"

TEMPLATES = {
    "headers with a date": HEADERS,
    "ChatML": IM,
    "ChatML with a default system message": IM_DEFAULT_SYSTEM,
    "the last query, thinking split off": LAST_QUERY,
    "alternating roles": ALTERNATING,
    "alternating roles, system in the last turn": SYSTEM_LAST_TURN,
    "state in a namespace": BAR_ROLES,
    "turns, no system": TURNS,
    "system before the first user": FIRST_USER_PREFIX,
    "generation tags": PIPE_ROLES,
    "tokens made of pieces": ROLE_PIECES,
    "harmony": HARMONY,
    "generation tags with white space control": BODY.replace("{{ m.content }}", "\n{%- generation -%}\n {{ m.content }} \n{%- endgeneration -%}\n"),
    "a scope within generation tags": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}" + BODY,
    "a break within generation tags": "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}" + BODY,
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}" + BODY,
    "a break outside of loops": BODY + "{% break %}",
    "white space": "\n\n   {% if true %}   \n  x  \n   {%- endif +%}  \n\t{# c #}\n  {{+ ' y ' -}}  \n{% raw %}{{ z }}{% endraw %}\n" + BODY + "\n\n",
    "tojson": "{{ messages | tojson }}|{{ {'b': '<&é\"\\'>', 'a': none} | tojson }}|" + BODY,
    "tojson with all options": (
        "{{ messages | tojson(indent=2) }}{{ messages | tojson(ensure_ascii=True) }}{{ messages[0] | tojson(separators=(',', ':')) }}"
        "{{ {'b': 1, 'a': [1.5, true, {}]} | tojson(sort_keys=True, indent=4) }}{{ messages | tojson(indent='--') }}" + BODY
    ),
    "tojson of what is no JSON": "{{ namespace(a=1) | tojson }}" + BODY,
    "tojson with an option that it has not": "{{ messages | tojson(skipkeys=true) }}" + BODY,
    "dates": "{{ strftime_now('%A %d %B %Y') }}{{ strftime_now('%%x') }}{{ strftime_now('%Y').split('0') | first }}" + BODY,
    "what is given": (
        "{{ messages is defined }}{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ add_generation_prompt }}"
        "{{ bos_token is defined }}{{ sep_token is defined }}{{ cls_token }}{{ pad_token }}{{ unk_token }}{{ xml_tools is defined }}" + BODY
    ),
    "tokens of its own": "{{ image_token }}{{ boi_token }}{{ eot_token }}" + BODY,
    "macros with defaults and callers": (
        "{% macro turn(role, text='none', end=eos_token) %}{{ role }}={{ text }}{{ caller() if caller else '' }}{{ end }}{% endmacro %}"
        "{% for m in messages %}{{ turn(m.role, m.content) }}{% call turn('x', end='') %}inside{% endcall %}{% endfor %}{{ reasoning_effort }}"
    ),
    "dictionaries and namespaces": (
        "{% set ns = namespace(self=1, seen=dict()) %}{% set d = dict(a=1, **{'b': 2}) %}{{ d }}{{ dict.fromkeys(['k']) }}{{ d.items() | list }}"
        "{% for k, v in d | dictsort(reverse=true) %}{{ k }}{{ v }}{% endfor %}{{ ns.self }}{{ d.get('z', 'none') }}" + BODY
    ),
    "underscores in a namespace": "{% set ns = namespace(_a=1) %}" + BODY,
    "underscores set on a namespace": "{% set ns = namespace() %}{% set ns._a = 1 %}" + BODY,
    "lists that change": "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}" + BODY,
    "dictionaries that change": "{% set _ = messages[0].update({'role': 'x'}) %}" + BODY,
    "attributes of Python": "{{ ''.__class__ }}{{ messages.__len__ }}" + BODY,
    "attributes of Python's types": "{{ ().__class__.__mro__ }}" + BODY,
    "what is not there": "{{ nothing.at_all }}" + BODY,
    "what is not there, printed": "{{ nothing }}{{ messages[0].nothing }}{{ messages[99] }}" + BODY,
    "filters": (
        "{{ messages | map(attribute='role') | join(',') | upper }}{{ messages | selectattr('role', 'eq', 'user') | list | length }}"
        "{{ messages | groupby('role') | map('first') | list }}{{ messages[-1].content | replace('a', 'b') | title | truncate(20) }}"
        "{{ '%s-%05.1f' | format('x', 2.345) }}{{ [3, 1, 2] | sort(reverse=true) }}{{ 'a b' | wordcount }}{{ [1, [2]] | string }}{{ 7 // 2 ~ 7 % 4 ~ 2 ** 5 }}" + BODY
    ),
    "tests and slices": (
        "{{ messages[:-1] | length }}{{ messages[::2] | length }}{{ 'x' in messages[0].content }}{{ messages is sequence }}{{ messages[0] is mapping }}"
        "{{ messages[0].content is string and messages[0].content is not none }}{{ loop is defined }}{{ 5 is divisibleby 5 }}" + BODY
    ),
    "escapes": "{{ '\\u00e9\\t\\x41' }}{{ \"it's\" ~ 'say \"x\"' }}{{ '<b>' | e }}{{ '<b>' | safe }}{{ '\\\\n' }}" + BODY,
    "half a surrogate pair": "{{ '\\ud83d' }}" + BODY,
    "a recursive loop": "{% for m in [[1, [2, [3]]]] recursive %}{% if m is iterable %}<{{ loop(m) }}>{% else %}{{ m }}{% endif %}{% endfor %}" + BODY,
    "a block and a filter section": "{% block b %}{{ messages[0].content }}{% endblock %}{% filter upper %}{{ messages[0].role }}{% endfilter %}{% set x %}in {{ 1 }}{% endset %}{{ x }}" + BODY,
    "an include": "{% include 'other' %}" + BODY,
    "arithmetic that fails": "{{ 1 / 0 }}" + BODY,
    "no Jinja": BODY + "{% if %}",
    "a loop that is too long": "{% for i in range(10 ** 9) %}{% endfor %}" + BODY,
    "do": "{% do messages.append(1) %}" + BODY,
    "a conversation that it refuses": "{{ raise_exception('never ' + reasoning_effort) }}",
}  # fmt: skip
