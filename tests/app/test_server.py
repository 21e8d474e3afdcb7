"""The address of the web app, where ports are taken and where they are free."""

import contextlib
import socket
import urllib.request

import gradio as gr
import pytest

from diffusers_sparse3d.app.server import ServerSettings, start_app
from tests.app.boxy import boxy_pipeline


@pytest.fixture
def taken():
    """A port that another program listens on: the first that the app would try."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # another program listens already
            stack.enter_context(socket.create_server(("127.0.0.1", 7860)))
        yield 7860


def test_the_printed_address_is_the_one_that_answers(taken, capsys, monkeypatch):
    pages = []

    def block_thread(blocks):
        """Opens the address that was printed, then interrupts the app."""
        address = capsys.readouterr().out.removeprefix("The app listens on ").strip()
        assert address == blocks.local_url and f":{taken}/" not in address
        pages.append(urllib.request.urlopen(address, timeout=10).read())
        blocks.close()

    monkeypatch.setattr(gr.Blocks, "block_thread", block_thread)
    _, address = start_app(boxy_pipeline())
    assert b"gradio" in pages[0] and address.startswith("http://127.0.0.1:")


def test_no_address_is_printed_if_the_port_is_taken(taken, capsys):
    with pytest.raises(OSError, match=str(taken)):
        start_app(boxy_pipeline(), ServerSettings(port=taken))
    assert "listens on" not in capsys.readouterr().out
