#!/bin/sh
# Put NVIDIA's perf_analyzer into a folder: the program of the tritonclient 2.50 wheel, and the two libraries that it needs,
# from the distribution (libb64-0d: Debian 12 and its kin) and from the CUDA runtime's wheel. Nothing outside the folder
# changes. tests/unit/serving/test_perf_analyzer.py runs it where it finds it.
#
#   benchmarks/install_perf_analyzer.sh [FOLDER]
set -eu
folder=${1:-$(dirname "$0")/perf_analyzer.work}
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$folder"
"$python" -m pip download -q --no-deps -d wheels tritonclient==2.50.0 nvidia-cuda-runtime-cu12
for wheel in wheels/*.whl; do "$python" -m zipfile -e "$wheel" .; done
apt-get download -q libb64-0d
dpkg -x libb64-0d_*.deb .
mv -f tritonclient-2.50.0.data/data/bin/perf_analyzer program
chmod +x program
rm -rf wheels tritonclient tritonclient-2.50.0.* ./*.deb
cat > perf_analyzer <<EOF
#!/bin/sh
LD_LIBRARY_PATH=$(find "$folder" -name 'libcudart.so.*' -exec dirname {} \; | head -n 1):$(find "$folder" -name 'libb64.so*' -exec dirname {} \; | head -n 1) exec "$folder/program" "\$@"
EOF
chmod +x perf_analyzer
echo "$folder/perf_analyzer"
