# The CPL0 part of the probe: entry, descriptor tables, interrupt handlers and three services.
# Short on purpose: where CPL0 code is emulated an instruction costs about a microsecond, while
# everything after the iretq runs natively. No SSE, no popcnt, no syscall, no int but int3.
#
# Entered by the 64-bit Linux boot protocol: long mode, CPL0, interrupts off, RSI = boot_params.

.set KERNEL_CODE, 0x10
.set KERNEL_DATA, 0x18
.set USER_DATA, 0x2b
.set USER_CODE, 0x33
.set TSS_SELECTOR, 0x40
.set IO_BITMAP_BYTES, 8192
.set LAPIC_EOI, 0xfee000b0
.set IA32_TSC_DEADLINE, 0x6e0

.section .boot.text,"ax",@progbits
.globl probe_start
probe_start:
    cli
    cld
    mov $pml4, %eax
    mov %rax, %cr3
    mov $0x80050033, %eax           # PG AM WP NE ET MP PE: no EM, no TS, so SSE works
    mov %rax, %cr0
    mov $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT
    mov %rax, %cr4
    mov $kernel_stack_top, %esp
    lgdt gdt_pointer(%rip)
    lidt idt_pointer(%rip)
    mov $TSS_SELECTOR, %eax
    ltr %ax
    mov $KERNEL_DATA, %eax
    mov %eax, %ss
    mov $USER_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov $0xff, %al                  # the 8259 pair stays silent; the IOAPIC delivers
    out %al, $0x21
    out %al, $0xa1
    mov $0x40000000, %eax           # CPUID here, not at CPL3: there it may be the host's answer
    cpuid
    cmp $0x40000010, %eax
    jb 1f
    mov $0x40000010, %eax
    cpuid
    mov %eax, probe_tsc_khz(%rip)
1:  mov $1, %eax
    cpuid
    mov %ecx, probe_cpuid1_ecx(%rip)
    mov %rsi, %rdi
    pushq $USER_DATA
    pushq $user_stack_top - 8       # as after a call
    pushq $0x202                    # IF
    pushq $USER_CODE
    pushq $probe_main
    iretq

# int3: eax selects. The gate clears IF.
#   0  sleep until an interrupt: rdi = the interrupt count seen last, rdx:rsi = TSC deadline (0 = none).
#      The count is compared with IF=0 and sti takes effect after hlt has begun: no lost wake-up.
#   1  like 0, but leaves the deadline timer as it is
#   2  rcx bytes at rsi to the port in dx: a port exit costs a third at CPL0 where CPL3 isn't trapped natively
#   3  forgets the IDT and faults: a triple fault
service:
    cmp $1, %eax
    ja 3f
    je 1f
    mov $IA32_TSC_DEADLINE, %ecx
    mov %esi, %eax
    wrmsr
1:  cmp %rdi, probe_interrupts(%rip)
    jne 2f
    sti
sleep_hlt:
    hlt
2:  iretq
3:  cmp $2, %eax
    jne 4f
    rep outsb
    iretq
4:  lidt no_idt(%rip)
    ud2

# An interrupt must not come between sti and hlt, and where the CPU keeps its word none does. An emulated one may lose the
# shadow of sti over an exit; the hlt that would then sleep through what has just come is stepped over.
interrupt:
    push %rax
    cmpq $sleep_hlt, 8(%rsp)
    jne 1f
    incq 8(%rsp)
1:
    incq probe_interrupts(%rip)
    mov $LAPIC_EOI, %eax
    movl $0, (%rax)
    pop %rax
spurious:
    iretq

# An exception: the first goes to Rust at CPL3, which prints and exits; a second one exits here.
# On the stack: vector, error code, rip, cs, rflags, rsp, ss.
exception:
    mov $4, %al
    cmpl $0, dying(%rip)
    jne 1f
    movl $1, dying(%rip)
    pop %rdi
    pop %rsi
    pop %rdx
    mov 16(%rsp), %rcx
    mov %cr2, %r8
    pushq $USER_DATA
    pushq $user_stack_top - 8       # as after a call
    pushq $0x2
    pushq $USER_CODE
    pushq $probe_exception
    iretq
1:  out %al, $0xf4
    cli
    hlt
    jmp 1b

# Vectors 0-31, 16 bytes each; those to which the CPU gives no error code push a zero.
.balign 16
exception_stubs:
.set v, 0
.rept 32
    .balign 16
    .if v == 3
    jmp service
    .else
    .if (v == 8) || ((v >= 10) && (v <= 14)) || (v == 17) || (v == 21)
    .else
    pushq $0
    .endif
    pushq $v
    jmp exception
    .endif
    .set v, v+1
.endr

.section .boot.data,"aw",@progbits
.balign 4096
.macro PD_PAGE base, flags
    .set n, 0
    .rept 512
    .quad \base + (n << 21) + \flags
    .set n, n+1
    .endr
.endm
# Identity map of 4 GiB by 2 MiB pages: present, writable, user, large; 3-4 GiB also PWT, PCD.
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad pd0 + 7, pd1 + 7, pd2 + 7, pd3 + 7
    .fill 508, 8, 0
pd0: PD_PAGE 0x00000000, 0x87
pd1: PD_PAGE 0x40000000, 0x87
pd2: PD_PAGE 0x80000000, 0x87
pd3: PD_PAGE 0xc0000000, 0x9f

# One gate: present, DPL 3, 64-bit interrupt gate. Handlers lie within 64 KiB of 0x100000 (link.ld).
.macro GATE handler
    .word \handler - probe_start
    .word KERNEL_CODE
    .word 0xee00
    .word 0x0010
    .quad 0
.endm
.balign 16
idt:
    .set n, 0
    .rept 32
    GATE (exception_stubs + n*16)
    .set n, n+1
    .endr
    .rept 255-32
    GATE interrupt
    .endr
    GATE spurious
no_idt:
    .word 0
    .quad 0
idt_pointer:
    .word 256*16-1
    .quad idt
.balign 8
gdt_pointer:
    .word 10*8-1
    .quad gdt
.balign 16
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff        # 0x10 kernel code, 64-bit
    .quad 0x00cf93000000ffff        # 0x18 kernel data
    .quad 0x00cffb000000ffff        # 0x20 user code, 32-bit
    .quad 0x00cff3000000ffff        # 0x28 user data
    .quad 0x00affb000000ffff        # 0x30 user code, 64-bit
    .quad 0
gdt_tss:                            # 0x40 TSS; link.ld takes its base apart
    .word 0x68 + IO_BITMAP_BYTES
    .word tss_low
    .byte tss_middle
    .byte 0x89, 0x00, 0x00
    .quad 0
.balign 16
.globl tss
tss:
    .long 0
    .quad kernel_stack_top
    .fill 0x66 - 12, 1, 0
    .word 0x68
    .fill IO_BITMAP_BYTES, 1, 0     # every port is allowed at CPL3
    .byte 0xff
.balign 8
.globl probe_interrupts, probe_tsc_khz, probe_cpuid1_ecx
probe_interrupts: .quad 0
probe_tsc_khz: .long 0
probe_cpuid1_ecx: .long 0
dying: .long 0

.section .bss.boot,"aw",@nobits
.balign 16
    .skip 4096
kernel_stack_top:
    .skip 1048576
user_stack_top:
