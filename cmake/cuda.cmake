# The plug-in with the CUDA backend: target qwen2vl_cuda. Shared by the project (options QWEN2VL_CUDA and
# QWEN2VL_CUDA_STAND_IN) and by the package in cuda/. Needs a target qwen2vl_core with csrc/base and csrc/quant.
get_filename_component(QWEN2VL_ROOT ${CMAKE_CURRENT_LIST_DIR} DIRECTORY)
file(GLOB QWEN2VL_CUDA_SOURCES CONFIGURE_DEPENDS ${QWEN2VL_ROOT}/csrc/cuda/*.cu ${QWEN2VL_ROOT}/csrc/cuda/*.cpp)

if(QWEN2VL_CUDA_STAND_IN)
  # The C++ compiler alone builds the kernels, for a stand-in of the chip that runs them on the processor.
  file(GLOB QWEN2VL_STAND_IN_SOURCES CONFIGURE_DEPENDS ${QWEN2VL_ROOT}/tests/native/stand_in/*.cpp)
  set_source_files_properties(${QWEN2VL_CUDA_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  add_library(qwen2vl_cuda_objects OBJECT ${QWEN2VL_CUDA_SOURCES} ${QWEN2VL_STAND_IN_SOURCES})
  target_compile_definitions(qwen2vl_cuda_objects PUBLIC QWEN2VL_STAND_IN)
  # "unroll" is for the chip; kernels read pairs of 16-bit values as words, as nvcc lets them.
  target_compile_options(qwen2vl_cuda_objects PUBLIC -Wno-unknown-pragmas -fno-strict-aliasing)
  target_include_directories(qwen2vl_cuda_objects PUBLIC ${QWEN2VL_ROOT}/tests/native)
  target_link_libraries(qwen2vl_cuda_objects PUBLIC qwen2vl_core)
  add_library(qwen2vl_cuda MODULE)
  target_link_libraries(qwen2vl_cuda PRIVATE qwen2vl_cuda_objects)
else()
  if(CMAKE_VERSION VERSION_LESS 3.26)
    message(FATAL_ERROR "the CUDA plug-in needs CMake 3.26, which knows nvcc's C++20; found ${CMAKE_VERSION}")
  endif()
  set(QWEN2VL_CUDA_ARCHITECTURES "80-real;86-real;89-real;90a-real;100-real;120" CACHE STRING
    "GPU architectures to compile for; later ones run the last, which must not be -real")
  set(CMAKE_CUDA_ARCHITECTURES ${QWEN2VL_CUDA_ARCHITECTURES})

  # An installed toolkit's nvcc comes first; else the one that the nvidia-cuda-nvcc package brings.
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(QWEN2VL_NVCC nvcc NO_DEFAULT_PATH PATHS ENV PATH)
    if(NOT QWEN2VL_NVCC)
      find_package(Python REQUIRED COMPONENTS Interpreter)
      execute_process(
        COMMAND ${Python_EXECUTABLE} -c
          "from importlib.util import find_spec as f; print(*f('nvidia.cu13').submodule_search_locations)"
        OUTPUT_VARIABLE QWEN2VL_CU13 OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      if(NOT EXISTS "${QWEN2VL_CU13}/bin/nvcc")
        message(FATAL_ERROR "the CUDA plug-in needs nvcc: expected it in PATH, CMAKE_CUDA_COMPILER or CUDACXX, "
          "or the packages that cuda/pyproject.toml lists under [build-system] installed for "
          "${Python_EXECUTABLE}")
      endif()
      set(QWEN2VL_NVCC ${QWEN2VL_CU13}/bin/nvcc)
    endif()
    set(CMAKE_CUDA_COMPILER ${QWEN2VL_NVCC})
  endif()
  # The packages' libraries lie in lib/; nvcc looks in lib64/ alone. Known before the compiler is tried.
  get_filename_component(QWEN2VL_CUDA_TOP "${CMAKE_CUDA_COMPILER}" DIRECTORY)
  get_filename_component(QWEN2VL_CUDA_TOP "${QWEN2VL_CUDA_TOP}" DIRECTORY)
  if(EXISTS "${QWEN2VL_CUDA_TOP}/lib/libcudart_static.a")
    set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${QWEN2VL_CUDA_TOP}/lib")
  endif()
  enable_language(CUDA)

  add_library(qwen2vl_cuda MODULE ${QWEN2VL_CUDA_SOURCES})
  target_link_libraries(qwen2vl_cuda PRIVATE qwen2vl_core)
  set_target_properties(qwen2vl_cuda PROPERTIES
    CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static)
endif()

set_target_properties(qwen2vl_cuda PROPERTIES VISIBILITY_INLINES_HIDDEN ON)
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  # One name goes out: another library's C++ and CUDA runtimes must not meet ours.
  set(QWEN2VL_EXPORTS ${QWEN2VL_ROOT}/cmake/cuda_exports.map)
  target_link_options(qwen2vl_cuda PRIVATE LINKER:--version-script=${QWEN2VL_EXPORTS} LINKER:--gc-sections)
  set_property(TARGET qwen2vl_cuda APPEND PROPERTY LINK_DEPENDS ${QWEN2VL_EXPORTS})
endif()
