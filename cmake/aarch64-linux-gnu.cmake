# Cross-builds for aarch64 Linux with Debian's compiler (g++-aarch64-linux-gnu); its programs run under qemu-user, on
# the processor that QEMU_CPU names (cortex-a72, neoverse-n1, max).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR "qemu-aarch64;-L;/usr/aarch64-linux-gnu")
