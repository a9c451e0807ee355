# libmuonshard_cuda: the CUDA backend and the NCCL communicator, opened at run time. Its own copies of the few core files
# it needs make it stand alone.
set(MUONSHARD_CUDA_HOST
  src/kernels/cuda.c src/kernels/cuda_gemm.c src/kernels/cuda_gemm_table.c src/kernels/cuda_tiles.c src/kernels/cuda_tile_product.c src/kernels/cuda_orthogonalize.c src/kernels/cuda_plugin.c src/comm/nccl.c
  src/comm/comm.c src/status.c src/dtype.c src/kernels/program.c src/kernels/cuda_layout.c)
set(MUONSHARD_CUDA_KERNELS src/kernels/cuda_elementwise.cu src/kernels/cuda_sums.cu src/kernels/cuda_normalize.cu
  src/kernels/cuda_tile_kernel.cu)
list(TRANSFORM MUONSHARD_CUDA_HOST PREPEND ${PROJECT_SOURCE_DIR}/)
list(TRANSFORM MUONSHARD_CUDA_KERNELS PREPEND ${PROJECT_SOURCE_DIR}/)

find_program(NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
set(MUONSHARD_CUDA_FOUND FALSE)
if(NVCC)
  get_filename_component(CUDA_ROOT ${NVCC} REALPATH)
  get_filename_component(CUDA_ROOT ${CUDA_ROOT} DIRECTORY)
  get_filename_component(CUDA_ROOT ${CUDA_ROOT} DIRECTORY)
  find_path(CUDA_INCLUDE cublasLt.h HINTS ${CUDA_ROOT} PATH_SUFFIXES include targets/x86_64-linux/include)
  find_path(NCCL_INCLUDE nccl.h HINTS ${CUDA_ROOT} PATH_SUFFIXES include)
  foreach(library cudart cublasLt nccl)
    find_library(CUDA_${library} ${library} HINTS ${CUDA_ROOT} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib)
  endforeach()
  if(CUDA_INCLUDE AND NCCL_INCLUDE AND CUDA_cudart AND CUDA_cublasLt AND CUDA_nccl)
    set(MUONSHARD_CUDA_FOUND TRUE)
  endif()
endif()
if(MUONSHARD_CUDA STREQUAL "ON" AND NOT MUONSHARD_CUDA_FOUND)
  message(FATAL_ERROR "MUONSHARD_CUDA is ON; nvcc, cublasLt.h, nccl.h or their libraries were not found")
endif()
message(STATUS "libmuonshard_cuda: ${MUONSHARD_CUDA_FOUND}")

# Contraction is off as everywhere: element-wise results are the host's to the bit.
set(MUONSHARD_NVCC_FLAGS -std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden,-Wall
  -I${PROJECT_SOURCE_DIR}/include -I${PROJECT_SOURCE_DIR}/src)
set(MUONSHARD_NVCC_HOPPER -gencode=arch=compute_90a,code=sm_90a)
set(MUONSHARD_NVCC_ALL -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_89,code=sm_89
  ${MUONSHARD_NVCC_HOPPER} -gencode=arch=compute_90,code=compute_90)

if(MUONSHARD_CUDA_FOUND AND NOT MUONSHARD_CUDA STREQUAL "OFF" AND NOT MUONSHARD_SANITIZE)
  file(GLOB headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/*.h ${PROJECT_SOURCE_DIR}/src/kernels/*.h
    ${PROJECT_SOURCE_DIR}/src/kernels/*.cuh)
  set(objects)
  foreach(source ${MUONSHARD_CUDA_KERNELS})
    get_filename_component(name ${source} NAME_WE)
    set(object ${PROJECT_BINARY_DIR}/${name}.cu.o)
    set(architectures ${MUONSHARD_NVCC_ALL})
    if(name STREQUAL "cuda_tile_kernel")
      set(architectures ${MUONSHARD_NVCC_HOPPER})
    endif()
    add_custom_command(OUTPUT ${object} COMMAND ${NVCC} ${MUONSHARD_NVCC_FLAGS} ${architectures} -c ${source} -o ${object}
      DEPENDS ${source} ${headers} COMMENT "nvcc ${name}.cu" VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  add_library(muonshard_cuda MODULE ${MUONSHARD_CUDA_HOST} ${objects})
  target_include_directories(muonshard_cuda PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_include_directories(muonshard_cuda SYSTEM PRIVATE ${CUDA_INCLUDE} ${NCCL_INCLUDE})
  target_link_libraries(muonshard_cuda PRIVATE muonshard_flags ${CUDA_cudart} ${CUDA_cublasLt} ${CUDA_nccl}
    Threads::Threads m)
  # As a library, not a module: its name has the version in it, by which it is opened.
  set_target_properties(muonshard_cuda PROPERTIES PREFIX lib LINKER_LANGUAGE C
    INSTALL_RPATH "$ORIGIN" INSTALL_RPATH_USE_LINK_PATH TRUE
    SUFFIX .so.${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
    LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/muonshard_cuda.map)
  target_link_options(muonshard_cuda PRIVATE
    -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/muonshard_cuda.map -Wl,--no-undefined)
  target_link_libraries(muonshard_cuda PRIVATE stdc++)
  install(TARGETS muonshard_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
