"""Downloads from a server in this process: whole or not at all, resumed, and checked."""

import hashlib
import http.server
import pathlib
import re
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from meanflow_jax.runtime import downloads
from meanflow_jax.runtime.downloads import PUBLISHED, RemoteFile, download

CONTENT = bytes(range(256)) * 10_000


class Server(http.server.ThreadingHTTPServer):
  """Serves one file at every address; counts the bytes it sends.

  Attributes:
    content: of the file.
    resumes: whether it knows ranges.
    cut: bytes after which it hangs up, None for never.
    sent: bytes sent so far.
  """

  content = CONTENT
  resumes = True
  cut: int | None = None
  sent = 0

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers for `Server`."""

  server: Server

  def do_GET(self) -> None:
    if self.path == "/elsewhere":
      self.send_response(302)
      self.send_header("Location", f"{self.server.url}/file")
      self.end_headers()
      return
    if self.path == "/missing":
      self.send_error(404)
      return
    asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
    start = int(asked[1]) if asked and self.server.resumes else 0
    body = self.server.content[start:]
    self.send_response(206 if start else 200)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    body = body[: self.server.cut]
    self.server.sent += len(body)
    self.wfile.write(body)

  def log_message(self, *_: object) -> None:
    """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
  with Server() as running:
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()


def fetch(
  server: Server, folder: pathlib.Path, path: str = "file", content: bytes = CONTENT
) -> pathlib.Path:
  digest = hashlib.sha256(content).hexdigest()
  file = RemoteFile("weights.bin", f"{server.url}/{path}", digest, len(content))
  (made,) = download("it", folder, published={"it": (file,)}, open_url=urllib.request.urlopen)
  return made


def names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole(server: Server, tmp_path: pathlib.Path) -> None:
  path = fetch(server, tmp_path / "new" / "folder")
  assert path == tmp_path / "new" / "folder" / "weights.bin"
  assert path.read_bytes() == CONTENT
  assert names(path.parent) == ["weights.bin"]


def test_what_is_there_is_not_fetched_again(server: Server, tmp_path: pathlib.Path) -> None:
  fetch(server, tmp_path)
  server.sent = 0
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert server.sent == 0


@pytest.mark.parametrize("path", ["file", "elsewhere"])
@pytest.mark.parametrize("resumes", [True, False])
def test_a_broken_connection_is_resumed(
  server: Server, tmp_path: pathlib.Path, resumes: bool, path: str
) -> None:
  server.cut = 1_500_000
  with pytest.raises(ConnectionError, match=r"1500000 of 2560000 bytes.*the same command resumes"):
    fetch(server, tmp_path, path)
  assert names(tmp_path) == ["weights.bin.partial"]
  server.cut, server.sent, server.resumes = None, 0, resumes
  assert fetch(server, tmp_path, path).read_bytes() == CONTENT
  assert server.sent == (1_060_000 if resumes else 2_560_000)
  assert names(tmp_path) == ["weights.bin"]


def test_a_download_that_a_kill_left_whole_is_taken(server: Server, tmp_path: pathlib.Path) -> None:
  (tmp_path / "weights.bin.partial").write_bytes(CONTENT)
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert server.sent == 0


@pytest.mark.parametrize("begun", [b"", b"of another file"])
def test_another_file_is_deleted(server: Server, tmp_path: pathlib.Path, begun: bytes) -> None:
  if begun:
    (tmp_path / "weights.bin.partial").write_bytes(begun)
  else:
    server.content = CONTENT[:-1] + b"x"
  got = hashlib.sha256(begun + server.content[len(begun) :]).hexdigest()
  with pytest.raises(ValueError, match="another file than is known") as error:
    fetch(server, tmp_path)
  assert got in str(error.value)
  assert hashlib.sha256(CONTENT).hexdigest() in str(error.value)
  assert names(tmp_path) == []


def test_a_longer_file_is_not_taken_for_ours(server: Server, tmp_path: pathlib.Path) -> None:
  server.content = CONTENT + CONTENT
  (tmp_path / "weights.bin.partial").write_bytes(CONTENT + b"more")
  with pytest.raises(ValueError, match="another file than is known"):
    fetch(server, tmp_path)


def test_what_somebody_else_wrote_is_left(server: Server, tmp_path: pathlib.Path) -> None:
  (tmp_path / "weights.bin").write_bytes(b"precious")
  with pytest.raises(ValueError, match=r"weights.bin exists and is not the published file"):
    fetch(server, tmp_path)
  assert (tmp_path / "weights.bin").read_bytes() == b"precious"
  assert server.sent == 0


def test_errors_of_the_server_are_told(server: Server, tmp_path: pathlib.Path) -> None:
  with pytest.raises(ConnectionError, match="/missing: HTTP Error 404"):
    fetch(server, tmp_path, "missing")


# Addresses.


def test_only_https_is_opened(server: Server, tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match="only https is followed, not http://127"):
    downloads.open_https(urllib.request.Request(f"{server.url}/file"))
  opener = urllib.request.build_opener(downloads.HttpsRedirects)
  with pytest.raises(ValueError, match=f"only https is followed, not {server.url}/file"):
    opener.open(f"{server.url}/elsewhere")
  assert fetch(server, tmp_path, "elsewhere").exists()  # redirects as such work


def test_names_are_checked(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match=r"'sd-vae'.*dinov2-large.*inception.*sd-vae-ft-ema"):
    download("sd-vae", tmp_path / "new")
  assert names(tmp_path) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_pinned(name: str) -> None:
  for file in PUBLISHED[name]:
    assert file.url.startswith("https://")
    assert file.url.endswith(f"/{file.name}")
    assert re.search(r"/resolve/[0-9a-f]{40}/|/releases/download/", file.url)
    assert re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert file.size > 0


def test_a_file_of_pytorch_is_named_after_its_hash() -> None:
  (file,) = PUBLISHED["inception"]
  assert file.name == f"pt_inception-2015-12-05-{file.sha256[:8]}.pth"
