"""Published weights: where each file is, its size and sha256; and the only download there is."""

import dataclasses
import hashlib
import http.client
import os
import pathlib
import urllib.request
from collections.abc import Callable, Mapping

import tqdm

HUGGING_FACE = "https://huggingface.co/{model}/resolve/{revision}/{name}"
COMMAND = "python -m meanflow_jax.convert --download={name} --out={folder}"
TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class RemoteFile:
  """A published file.

  Attributes:
    name: of the file on disk.
    url: its address, of a revision that does not change.
    sha256: of its bytes, in hexadecimal digits.
    size: in bytes.
  """

  name: str
  url: str
  sha256: str
  size: int


def _hugging_face(
  model: str, revision: str, *files: tuple[str, str, int]
) -> tuple[RemoteFile, ...]:
  return tuple(
    RemoteFile(name, HUGGING_FACE.format(model=model, revision=revision, name=name), sha256, size)
    for name, sha256, size in files
  )


_VAE_CONFIG = (
  "config.json",
  "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e",
  547,
)

PUBLISHED: dict[str, tuple[RemoteFile, ...]] = {
  "sd-vae-ft-mse": _hugging_face(
    "stabilityai/sd-vae-ft-mse",
    "31f26fdeee1355a5c34592e401dd41e45d25a493",
    _VAE_CONFIG,
    (
      "diffusion_pytorch_model.safetensors",
      "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
      334_643_276,
    ),
  ),
  "sd-vae-ft-ema": _hugging_face(
    "stabilityai/sd-vae-ft-ema",
    "f04b2c4b98319346dad8c65879f680b1997b204a",
    _VAE_CONFIG,
    (
      "diffusion_pytorch_model.safetensors",
      "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
      334_643_276,
    ),
  ),
  "dinov2-large": _hugging_face(
    "facebook/dinov2-large",
    "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
    (
      "config.json",
      "12df51c069a2dc1305e34ba71ef58bc2407ea553b75f4722a1715c1bce3bbed0",
      549,
    ),
    (
      "model.safetensors",
      "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
      1_217_522_888,
    ),
  ),
  "inception": (
    RemoteFile(
      "pt_inception-2015-12-05-6726825d.pth",
      "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
      "pt_inception-2015-12-05-6726825d.pth",
      "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
      95_628_359,
    ),
  ),
}


def sha256(path: pathlib.Path | str) -> str:
  """The hash of a file of any size, in hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


# Fetching.


class HttpsRedirects(urllib.request.HTTPRedirectHandler):
  """Follows redirects to https alone."""

  def redirect_request(
    self,
    req: urllib.request.Request,
    fp: http.client.HTTPResponse,
    code: int,
    msg: str,
    headers: http.client.HTTPMessage,
    newurl: str,
  ) -> urllib.request.Request | None:
    """The request for what an answer points to."""
    _check_https(newurl)
    return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_https(request: urllib.request.Request) -> http.client.HTTPResponse:
  """The answer to a request.

  Raises:
    ValueError: an address that is not https.
    OSError: no answer, or an error.
  """
  _check_https(request.full_url)
  return urllib.request.build_opener(HttpsRedirects).open(request, timeout=TIMEOUT)


def _check_https(url: str) -> None:
  if not url.startswith("https://"):
    raise ValueError(f"only https is followed, not {url}")


Opener = Callable[[urllib.request.Request], http.client.HTTPResponse]


def download(
  name: str,
  folder: pathlib.Path | str,
  *,
  published: Mapping[str, tuple[RemoteFile, ...]] = PUBLISHED,
  open_url: Opener = open_https,
) -> list[pathlib.Path]:
  """Fetches the files of a model into a folder, which is made; a second call resumes.

  What is there already, with the right hash, is left alone.

  Args:
    name: a key of `published`.
    folder: for its files.
    published: where they are.
    open_url: opens an address.

  Returns:
    The paths of all files.

  Raises:
    ValueError: an unknown name, or a file with another hash: one that was there before is left as
      it is, one that was fetched is deleted.
    OSError: the connection failed; what has arrived is kept, and resumed from.
  """
  if name not in published:
    raise ValueError(f"there is nothing to download by the name {name!r}: try {sorted(published)}")
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  return [_download(file, folder / file.name, open_url) for file in published[name]]


def _download(file: RemoteFile, path: pathlib.Path, open_url: Opener) -> pathlib.Path:
  if path.exists():
    if (found := sha256(path)) != file.sha256:
      raise ValueError(
        f"{path} exists and is not the published file: its sha256 is {found}, that of {file.url} "
        f"is {file.sha256}. It is left as it is: move it, or choose another folder."
      )
    return path
  partial = path.with_name(f"{path.name}.partial")
  _fetch(file, partial, open_url)
  if (found := sha256(partial)) != file.sha256:
    partial.unlink()
    raise ValueError(
      f"{file.url} gave another file than is known: its sha256 is {found} instead of "
      f"{file.sha256}. It has been deleted."
    )
  os.replace(partial, path)
  return path


def _fetch(file: RemoteFile, partial: pathlib.Path, open_url: Opener) -> None:
  """Adds to a partial file what it lacks."""
  have = partial.stat().st_size if partial.exists() else 0
  if have >= file.size:
    return
  request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
  try:
    with open_url(request) as response:
      if response.status != http.client.PARTIAL_CONTENT:
        have = 0  # the server does not resume: it begins again
      _receive(response, file, partial, have)
  except (OSError, http.client.HTTPException) as error:
    raise ConnectionError(
      f"{file.url}: {error}. What has arrived is kept in {partial}; the same command resumes."
    ) from error


def _receive(
  response: http.client.HTTPResponse, file: RemoteFile, partial: pathlib.Path, have: int
) -> None:
  bar = tqdm.tqdm(
    desc=file.name, total=file.size, initial=have, unit="B", unit_scale=True, disable=None
  )
  with bar, partial.open("ab") as out:
    out.truncate(have)
    while have < file.size and (chunk := response.read(min(CHUNK, file.size - have))):
      out.write(chunk)
      have += len(chunk)
      bar.update(len(chunk))
  if have < file.size:
    raise ConnectionError(f"the connection ended after {have} of {file.size} bytes")
