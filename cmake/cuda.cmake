# The CUDA part of the library: csrc/cuda/*.cu, where there are any and a compiler is found.
set(EESD_WITH_CUDA OFF)
file(GLOB EESD_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")
if(NOT EESD_CUDA OR NOT EESD_CUDA_SOURCES)
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "no CUDA compiler: building the CPU part alone")
  return()
endif()

# Fat binary for Ampere, Hopper and Blackwell, with PTX of the last for what comes after.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

set(EESD_WITH_CUDA ON)
target_sources(eesd PRIVATE ${EESD_CUDA_SOURCES})
# --fmad=false: the same bits as the CPU's -ffp-contract=off, see csrc/include/eesd/mathf.h.
target_compile_options(eesd PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false>)
# The static runtime: the library then loads, and reports no device, on a machine without CUDA.
set_target_properties(eesd PROPERTIES
  CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}"
  CUDA_RUNTIME_LIBRARY Static
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON)
target_compile_definitions(eesd PUBLIC EESD_WITH_CUDA)
target_link_libraries(eesd PUBLIC CUDA::cudart_static)
