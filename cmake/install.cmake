# What an outside program needs: libraries with versions, headers, find_package(muonshard), pkg-config.
include(CMakePackageConfigHelpers)

file(STRINGS ${PROJECT_SOURCE_DIR}/include/muonshard.h lines REGEX "define MUONSHARD_VERSION_[A-Z]+ ")
string(REGEX REPLACE "[^0-9;]" "" lines "${lines}")
string(REPLACE ";" "." header_version "${lines}")
if(NOT header_version VERSION_EQUAL PROJECT_VERSION)
  message(FATAL_ERROR "include/muonshard.h says version ${header_version}, CMakeLists.txt ${PROJECT_VERSION}")
endif()

# The names are the same for those who add this directory to their build and for those who install it.
add_library(muonshard::muonshard ALIAS muonshard)
add_library(muonshard::mpi ALIAS muonshard_mpi)
set_target_properties(muonshard_mpi PROPERTIES EXPORT_NAME mpi INSTALL_RPATH "$ORIGIN")

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/muonshard)
# Two sets, so that a program without MPI need not have it.
foreach(lib muonshard muonshard_mpi)
  install(TARGETS ${lib} EXPORT ${lib} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(EXPORT ${lib} NAMESPACE muonshard:: FILE ${lib}-targets.cmake DESTINATION ${package_dir})
endforeach()
install(FILES ${PROJECT_SOURCE_DIR}/include/muonshard.h ${PROJECT_SOURCE_DIR}/include/muonshard_mpi.h
  ${PROJECT_SOURCE_DIR}/include/muonshard_nccl.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

configure_package_config_file(cmake/muonshard-config.cmake.in muonshard-config.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(muonshard-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/muonshard-config.cmake ${PROJECT_BINARY_DIR}/muonshard-config-version.cmake
  DESTINATION ${package_dir})

# Paths relative to the .pc file: `cmake --install --prefix` may go elsewhere than the configured prefix.
file(RELATIVE_PATH PC_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
file(RELATIVE_PATH PC_LIBDIR ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_LIBDIR})
file(RELATIVE_PATH PC_INCLUDEDIR ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
# The MPI it was built with is the only one that fits.
list(TRANSFORM MPI_C_INCLUDE_DIRS PREPEND "-I" OUTPUT_VARIABLE PC_MPI_CFLAGS)
list(JOIN PC_MPI_CFLAGS " " PC_MPI_CFLAGS)
list(JOIN MPI_C_LIBRARIES " " PC_MPI_LIBS)
foreach(pc muonshard muonshard_mpi)
  configure_file(cmake/${pc}.pc.in ${pc}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${pc}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endforeach()
