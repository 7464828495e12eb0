#!/usr/bin/env bash
# A real SGLang on a CPU, for `make test-sglang`: build.sh [FOLDER], by default .venv-sglang in the checkout.
# Does nothing when the folder was built from these very files.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-$here/../../.venv-sglang}
stamp=$venv/.built-from
inputs=("$here/build.sh" "$here/requirements.txt" "$here"/site/*.p* "$here"/site/sgl_kernel/*.py)
wanted=$(cat "${inputs[@]}" | sha256sum | cut -d' ' -f1)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

rm -rf "$venv"
"${PYTHON:-python3.11}" -m venv "$venv"
pip=("$venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 -c "$here/requirements.txt"
"${pip[@]}" --no-deps -r "$here/requirements.txt"
site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
cp -r "$here/site/." "$site/"
rm -rf "$site/sgl_kernel/__pycache__"
echo "import torchvision_on_cpu" > "$site/torchvision_on_cpu.pth"
SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 "$venv/bin/python" -c "import sglang; print('built sglang', sglang.__version__)"
echo "$wanted" > "$stamp"
