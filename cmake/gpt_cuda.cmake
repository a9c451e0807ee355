# libmuonshard_gpt_cuda: the layers of the harness's GPT on CUDA, opened at run time. It shares nothing with libmuonshard_cuda
# but the stream it is given.
set(GPT_CUDA_HOST ${PROJECT_SOURCE_DIR}/launch/gpt/gpt_cuda.c ${PROJECT_SOURCE_DIR}/launch/gpt/gpt_cuda_gemm.c)
set(GPT_CUDA_KERNELS ${PROJECT_SOURCE_DIR}/launch/gpt/gpt_cuda_kernels.cu)

if(MUONSHARD_CUDA_FOUND AND NOT MUONSHARD_CUDA STREQUAL "OFF" AND NOT MUONSHARD_SANITIZE)
  file(GLOB headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/launch/gpt/*.h ${PROJECT_SOURCE_DIR}/launch/gpt/*.cuh)
  set(object ${PROJECT_BINARY_DIR}/gpt_cuda_kernels.cu.o)
  add_custom_command(OUTPUT ${object} COMMAND ${NVCC} ${MUONSHARD_NVCC_FLAGS} ${MUONSHARD_NVCC_ALL} -c ${GPT_CUDA_KERNELS} -o ${object}
    DEPENDS ${GPT_CUDA_KERNELS} ${headers} COMMENT "nvcc gpt_cuda_kernels.cu" VERBATIM)
  add_library(muonshard_gpt_cuda MODULE ${GPT_CUDA_HOST} ${object})
  target_include_directories(muonshard_gpt_cuda PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/launch/gpt)
  target_include_directories(muonshard_gpt_cuda SYSTEM PRIVATE ${CUDA_INCLUDE})
  target_link_libraries(muonshard_gpt_cuda PRIVATE muonshard_flags ${CUDA_cudart} ${CUDA_cublasLt} stdc++ m)
  # As libmuonshard_cuda: its name has the version in it, by which it is opened.
  set_target_properties(muonshard_gpt_cuda PROPERTIES PREFIX lib LINKER_LANGUAGE C
    SUFFIX .so.${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
    LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/muonshard_gpt_cuda.map)
  target_link_options(muonshard_gpt_cuda PRIVATE
    -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/muonshard_gpt_cuda.map -Wl,--no-undefined)
  install(TARGETS muonshard_gpt_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
