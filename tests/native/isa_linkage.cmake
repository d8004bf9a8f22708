# Object files of an instruction set must define no symbol that the linker may share with other files (weak:
# inline functions, template instances): it could pick the copy compiled for AVX-512 to serve every processor.
# Arguments: NM, OBJECTS (separated by "|").
string(REPLACE "|" ";" objects "${OBJECTS}")
list(FILTER objects INCLUDE REGEX "/kernels/(avx[^/]*|neon|dotprod|i8mm)/")
if(NOT objects)
  message(FATAL_ERROR "no object file of an instruction set among ${OBJECTS}")
endif()
foreach(object IN LISTS objects)
  execute_process(COMMAND "${NM}" -C --defined-only "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
  if(weak)
    list(JOIN weak "\n" weak)
    message(SEND_ERROR "${object} defines shared symbols:\n${weak}")
  endif()
endforeach()
