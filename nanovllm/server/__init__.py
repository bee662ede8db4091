"""The engine behind OpenAI's HTTP interface: `nanovllm serve`. Needs the optional extra `server`.

    body -> protocol (what is asked) -> chat | completions (prompts) -> AsyncLLM.follow -> answers -> JSON

`app` has the routes, `streaming` writes server-sent events, `metrics` counts, `run` listens and ends. Only the command
line imports this package.
"""
