//! A process dies before each of its stores to the region in turn, while it selects and releases; another one goes on.
//!
//! The stores are numbered by the processor: the region is mapped read-only, so that each store faults; the handler counts it,
//! lets this one instruction through, and closes the region again. Nothing in the code under test knows of it.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(unsafe_code, reason = "signal handlers and page protection have no safe interface")]

mod fleet;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::{env, mem, ptr};

use router_core::metrics::Slab;
use router_core::outcome::{Outcome, OutcomeKind};
use router_core::prompt::Endpoint;
use router_core::region::Region;
use router_core::router::{Request, Router, Settings};

use fleet::{MODEL, settings};

const TASK: &str = "WARMROUTE_TEST_STORE";
const WORKERS: usize = 20;
/// `make test-all` takes each store, in release mode.
const EVERY: u64 = if cfg!(debug_assertions) { 9 } else { 1 };

static START: AtomicUsize = AtomicUsize::new(0);
static LENGTH: AtomicUsize = AtomicUsize::new(0);
static STORES: AtomicU64 = AtomicU64::new(0);
static FATAL: AtomicU64 = AtomicU64::new(0);

/// The processor stops after the next instruction.
const TRAP_FLAG: i64 = 0x100;

fn protect(protection: i32) {
    let start = START.load(Ordering::Relaxed) as *mut libc::c_void;
    // SAFETY: the range is a mapping of this process.
    unsafe { libc::mprotect(start, LENGTH.load(Ordering::Relaxed), protection) };
}

extern "C" fn on_store(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives both to a handler with SA_SIGINFO.
    let (address, context) = unsafe { ((*info).si_addr() as usize, &mut *context.cast::<libc::ucontext_t>()) };
    let start = START.load(Ordering::Relaxed);
    if !(start..start + LENGTH.load(Ordering::Relaxed)).contains(&address) {
        // SAFETY: always.
        unsafe { libc::_exit(99) };
    }
    // Before the death, too: the kernel must be able to write into the lock that it hands on.
    protect(libc::PROT_READ | libc::PROT_WRITE);
    if STORES.fetch_add(1, Ordering::Relaxed) + 1 == FATAL.load(Ordering::Relaxed) {
        // SAFETY: as above. As kill -9 from outside: nothing is unwound.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
    context.uc_mcontext.gregs[libc::REG_EFL as usize] |= TRAP_FLAG;
}

extern "C" fn after_store(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    protect(libc::PROT_READ);
    // SAFETY: as above.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    context.uc_mcontext.gregs[libc::REG_EFL as usize] &= !TRAP_FLAG;
}

fn handle(signal: i32, handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void)) {
    // SAFETY: an all-zero sigaction is valid, and the handler has the signature that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(signal, &raw const action, ptr::null_mut());
    }
}

/// Where this process has mapped the region.
fn find_mapping() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.contains("warmroute-region")).expect("a mapped region");
    let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
    let address = |text: &str| usize::from_str_radix(text, 16).unwrap();
    START.store(address(start), Ordering::Relaxed);
    LENGTH.store(address(end) - address(start), Ordering::Relaxed);
}

fn prompt(router: &Arc<Router>, name: &str) -> Arc<Request> {
    let body = format!("{{\"model\": \"{MODEL}\", \"text\": \"{}\"}}", format!("{name} ").repeat(60));
    router.read(Endpoint::Generate, b"x-smg-routing-key: k\r\n", body.as_bytes(), 0).unwrap()
}

fn answered() -> Outcome {
    Outcome { kind: OutcomeKind::Answered, status: 200, prompt_tokens: 90, cached_tokens: 9, ..Outcome::CANCELLED }
}

fn route(router: &Arc<Router>, name: &str) {
    router.select(&prompt(router, name), 0, false).unwrap().unwrap().release(&answered(), 1).unwrap();
}

fn settings_of(policy: &str) -> Settings {
    // In turn, so that a prompt gets another holder each time.
    Settings { policy: policy.to_owned(), ..settings() }
}

/// Not a test of its own: what the other process runs. It dies before the store with the number that it is told, or says how many
/// there are by its exit.
#[test]
fn another_process() {
    let Ok(task) = env::var(TASK) else { return };
    let words: Vec<&str> = task.split(' ').collect();
    let file = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", words[0])).unwrap();
    let region = Region::attach(&file, 2, settings().index_memory_bytes, 1).unwrap();
    let router = Router::on(region, Slab::new(vec![]), settings_of(words[3])).unwrap();
    FATAL.store(words[1].parse().unwrap(), Ordering::Relaxed);
    let open = router.select(&prompt(&router, "still in flight"), 0, false).unwrap().unwrap();
    let request = prompt(&router, words[2]);
    find_mapping();
    handle(libc::SIGSEGV, on_store);
    handle(libc::SIGTRAP, after_store);
    protect(libc::PROT_READ);
    let lease = router.select(&request, 0, false).unwrap().unwrap();
    lease.release(&answered(), 1).unwrap();
    protect(libc::PROT_READ | libc::PROT_WRITE);
    println!("{}", STORES.load(Ordering::Relaxed));
    mem::forget(open);
    std::process::exit(0);
}

/// Dies before its store number `fatal`; None: it did, else how many there were.
fn run(file: &File, fatal: u64, name: &str, policy: &str) -> Option<u64> {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["another_process", "--exact", "--nocapture"]).stdin(Stdio::null());
    let output = command.env(TASK, format!("{} {fatal} {name} {policy}", file.as_raw_fd())).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    match output.status.code() {
        None => None,
        Some(0) => Some(text.lines().find_map(|line| line.parse().ok()).expect("a number of stores")),
        Some(code) => panic!("{code}: {text} {}", String::from_utf8_lossy(&output.stderr)),
    }
}

fn dies_before_each_store(policy: &str) -> u64 {
    let Settings { index_memory_bytes, seed, hash_seed, .. } = settings();
    let (region, file) = Region::shared(2, index_memory_bytes, seed, hash_seed).unwrap();
    let router = Router::on(region, Slab::new(vec![]), settings_of(policy)).unwrap();
    for _ in 0..WORKERS {
        let slots = router.add_worker(&[MODEL.to_owned()], 1, 1_000_000, None).unwrap();
        router.observe_probe(slots[0], true).unwrap();
    }
    let mut deaths = 0;
    // As many as change where a block's holders stand: an entry for one, for two, a row, a dense row.
    for holders in [0, 1, 2, 13, 14, 15] {
        let prepare = |name: &str| (0..holders).for_each(|_| route(&router, name));
        prepare("all");
        let stores = run(&file, 0, "all", policy).expect("it lives");
        router.clear_process(1).unwrap();
        assert!(stores > 40, "{stores} stores are too few to be all");
        for fatal in (1..=stores).step_by(EVERY as usize) {
            let name = format!("{holders}-{fatal}");
            prepare(&name);
            deaths += u64::from(run(&file, fatal, &name, policy).is_none());
            // The other one goes on at once ...
            route(&router, &name);
            route(&router, "another");
            // ... and when the death is noticed, nothing is left of it.
            router.clear_process(1).unwrap();
            router.check_integrity().unwrap_or_else(|broken| panic!("{policy}, {name}: {broken}"));
            for target in router.targets().unwrap() {
                assert_eq!((target.load, target.outstanding_tokens), (0, 0), "{policy}, {name}, slot {}", target.slot);
                assert!(target.available);
            }
        }
    }
    deaths
}

#[test]
fn a_process_may_die_before_any_store() {
    for policy in ["round_robin", "manual"] {
        let deaths = dies_before_each_store(policy);
        println!("{policy}: {deaths} deaths");
        assert!(deaths > 30, "{policy}: {deaths} deaths");
    }
}
