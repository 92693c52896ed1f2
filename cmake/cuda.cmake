# Compiles CUDA_KERNELS with nvcc alone. CMake's own CUDA language is not enabled: it would look for a toolkit with
# libraries, while a .cu file here needs nvcc and the runtime's headers only.
#
# Sets LECT11EXT_WITH_CUDA, CUDA_OBJECTS, CUDA_INCLUDES, CUDA_RUNTIME, CUDA_ARCHITECTURE_NAMES.
find_program(NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" /usr/local/cuda/bin)
set(LECT11EXT_WITH_CUDA OFF)
set(CUDA_ARCHITECTURE_NAMES "")
set(WANTED "$ENV{LECT11EXT_CUDA}")
if(WANTED STREQUAL "0")
  message(STATUS "CUDA: off (LECT11EXT_CUDA=0)")
  return()
endif()
if(TORCH_CUDA STREQUAL "none" OR NOT NVCC)
  if(WANTED STREQUAL "1")
    message(FATAL_ERROR "LECT11EXT_CUDA=1, but torch ${TORCH_VERSION} has CUDA '${TORCH_CUDA}' and nvcc is '${NVCC}'")
  endif()
  message(STATUS "CUDA: off (torch's CUDA: ${TORCH_CUDA}; nvcc: ${NVCC})")
  return()
endif()

execute_process(COMMAND "${NVCC}" --version OUTPUT_VARIABLE NVCC_VERSION)
string(REGEX MATCH "release ([0-9]+)" NVCC_VERSION "${NVCC_VERSION}")
set(NVCC_MAJOR "${CMAKE_MATCH_1}")
if(NOT TORCH_CUDA MATCHES "^${NVCC_MAJOR}\\.")
  message(WARNING "nvcc is of CUDA ${NVCC_MAJOR} and torch ${TORCH_VERSION} of CUDA ${TORCH_CUDA}: the module may not load")
endif()

# Real code for the architectures in use, and PTX of a plain one last, which any later GPU can translate.
set(ARCHITECTURES "$ENV{LECT11EXT_CUDA_ARCHITECTURES}")
if(NOT ARCHITECTURES)
  set(ARCHITECTURES 80 90a 100)
endif()
separate_arguments(ARCHITECTURES)
set(GENCODE "")
foreach(ARCHITECTURE IN LISTS ARCHITECTURES)
  list(APPEND GENCODE "-gencode=arch=compute_${ARCHITECTURE},code=sm_${ARCHITECTURE}")
  string(APPEND CUDA_ARCHITECTURE_NAMES "sm_${ARCHITECTURE} ")
endforeach()
list(APPEND GENCODE "-gencode=arch=compute_80,code=compute_80")
string(APPEND CUDA_ARCHITECTURE_NAMES "compute_80")
# Kernels that sm_90a alone can run are empty elsewhere; the host must know whether they are in the module.
set(CUDA_DEFINITIONS "")
if("90a" IN_LIST ARCHITECTURES)
  list(APPEND CUDA_DEFINITIONS -DLECT11EXT_SM90A)
endif()

get_filename_component(NVCC_REAL "${NVCC}" REALPATH)
get_filename_component(CUDA_ROOT "${NVCC_REAL}" DIRECTORY)
get_filename_component(CUDA_ROOT "${CUDA_ROOT}" DIRECTORY)
set(CUDA_INCLUDES "")
foreach(FOLDER "${CUDA_PACKAGE_INCLUDE}" "${CUDA_ROOT}/include")
  if(EXISTS "${FOLDER}/cuda_runtime_api.h")
    list(APPEND CUDA_INCLUDES "${FOLDER}")
  endif()
endforeach()
find_library(CUDA_RUNTIME NAMES cudart libcudart.so.13 libcudart.so.12
  HINTS "${CUDA_PACKAGE_INCLUDE}/../lib" "${CUDA_ROOT}/lib64" "${CUDA_ROOT}/lib" "${CUDA_ROOT}/targets/x86_64-linux/lib")

set(CUDA_OBJECTS "")
foreach(SOURCE IN LISTS CUDA_KERNELS)
  string(REPLACE "/" "_" OBJECT "${SOURCE}.o")
  set(OBJECT "${CMAKE_BINARY_DIR}/${OBJECT}")
  add_custom_command(OUTPUT "${OBJECT}"
    COMMAND "${NVCC}" -std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden ${GENCODE}
            ${CUDA_DEFINITIONS}
            -I "${CMAKE_SOURCE_DIR}/csrc" -MD -MF "${OBJECT}.d" -c "${CMAKE_SOURCE_DIR}/${SOURCE}" -o "${OBJECT}"
    DEPENDS "${CMAKE_SOURCE_DIR}/${SOURCE}" DEPFILE "${OBJECT}.d" VERBATIM)
  list(APPEND CUDA_OBJECTS "${OBJECT}")
endforeach()
set(LECT11EXT_WITH_CUDA ON)
message(STATUS "CUDA: ${NVCC}, ${CUDA_ARCHITECTURE_NAMES}")
