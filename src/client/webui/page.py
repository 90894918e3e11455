"""The page itself: gradio's chat with its list of conversations, which the browser keeps, and our parameters."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import gradio as gr

from shoal.client.api_client import APIClient, Message
from shoal.client.errors import APIError
from shoal.client.webui import talk

_FONTS: Final = ("ui-sans-serif", "system-ui", "sans-serif")
_MONOSPACE: Final = ("ui-monospace", "Consolas", "monospace")
_MOST_AT_ONCE: Final = 64
_STORAGE: Final = "shoal-conversations"

Shown = list[gr.ChatMessage]


def build(client: APIClient, models: Sequence[str]) -> gr.Blocks:
    """The page for one server."""
    with gr.Blocks(
        title=f"{models[0]} · Shoal", analytics_enabled=False, fill_height=True, fill_width=True
    ) as demo:
        with gr.Sidebar(label="Parameters", position="right"):
            status = gr.Markdown(elem_id="status")
            parameters = _parameters(models)
        chat = gr.ChatInterface(
            _answering(client),
            chatbot=_chatbot(models[0]),
            textbox=_textbox(),
            additional_inputs=parameters,
            additional_outputs=[status],
            editable=True,
            save_history=True,
            flagging_mode="never",
            analytics_enabled=False,
            concurrency_limit=_MOST_AT_ONCE,
            api_visibility="private",
            fill_width=True,
        )
        # The key only scrambles what lies in the browser; with another one each time nothing could be read again.
        chat.saved_conversations.secret = chat.saved_conversations.storage_key = _STORAGE
    return demo


def _chatbot(model: str) -> gr.Chatbot:
    return gr.Chatbot(
        elem_id="chatbot",
        show_label=False,
        placeholder=f"### {model}",
        scale=1,
        buttons=["copy", "copy_all"],
        allow_tags=True,
        feedback_options=None,
        latex_delimiters=[{"left": "$$", "right": "$$", "display": True}],
        render=False,
    )


def _textbox() -> gr.Textbox:
    return gr.Textbox(
        elem_id="say",
        placeholder="Say something; shift-enter begins a new line",
        show_label=False,
        container=False,
        lines=1,
        max_lines=12,
        autofocus=True,
        submit_btn=True,
        stop_btn=True,
        render=False,
    )


def launch(
    demo: gr.Blocks, *, server_name: str, server_port: int, share: bool, login: tuple[str, str] | None
) -> str:
    """Serves the page from threads of this process; its address. Raises OSError where the port is taken."""
    demo.queue(max_size=None)
    _, local_url, public_url = demo.launch(
        server_name=server_name,
        server_port=server_port,
        share=share,
        auth=login,
        theme=gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=_MONOSPACE),
        footer_links=["settings"],
        prevent_thread_lock=True,
        show_error=True,
        quiet=True,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        max_threads=_MOST_AT_ONCE,
    )
    return str(public_url or local_url)


def _parameters(models: Sequence[str]) -> list[gr.components.Component]:
    """In the order of ``talk.Wishes``."""
    return [
        gr.Dropdown(list(models), value=models[0], label="Model"),
        gr.Textbox("", label="System prompt", lines=2),
        gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: the likeliest words"),
        gr.Slider(0.05, 1, 0.8, step=0.05, label="Top p"),
        gr.Slider(0, 200, 40, step=1, label="Top k", info="0: all tokens"),
        gr.Slider(0, 8192, 1024, step=1, label="Longest answer", info="in tokens; 0: what fits"),
        gr.Slider(0.8, 2, 1, step=0.05, label="Repetition penalty"),
        gr.Textbox("", label="Seed", info="a number; empty: another answer each time", max_lines=1),
    ]


def _answering(client: APIClient) -> Callable[..., Iterator[tuple[Shown, str]]]:
    def answer(text: str, history: list[Message], *fields: Any) -> Iterator[tuple[Shown, str]]:
        """The messages of the answer so far, and the status line."""
        last = talk.Reply()
        try:
            for last in talk.reply(client, talk.Wishes(*fields), history, text):
                yield _shown(last), ""
            yield _shown(last), last.summary()
        except (APIError, ValueError) as error:
            yield [*_shown(last), _aside(str(error), "No answer")], last.summary()

    return answer


def _shown(reply: talk.Reply) -> Shown:
    state = "done" if reply.text or reply.finish_reason else "pending"
    thought = [_aside(reply.reasoning, "Reasoning", status=state)] if reply.reasoning else []
    text = [gr.ChatMessage(role="assistant", content=reply.text)] if reply.text else []
    return [*thought, *text]


def _aside(text: str, title: str, **metadata: str) -> gr.ChatMessage:
    """Shown under a title of its own, and never sent to the model."""
    return gr.ChatMessage(role="assistant", content=text, metadata={"title": title, **metadata})
