//! One region, several processes: they select and release as fast as they can, and some are killed while they do.
#![cfg(target_os = "linux")]

mod fleet;

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, thread};

use router_core::error::Error;
use router_core::metrics::Slab;
use router_core::outcome::{Outcome, OutcomeKind};
use router_core::prompt::Endpoint;
use router_core::region::{Found, Region};
use router_core::router::{Lease, Request, Router, Settings};

use fleet::{MODEL, settings};

const PROCESSES: usize = 3;
const TASK: &str = "WARMROUTE_TEST_TASK";
/// `make test-all` runs these in release mode, and longer.
const LEASES: usize = if cfg!(debug_assertions) { 10_000 } else { 500_000 };
const KILLS: u64 = if cfg!(debug_assertions) { 12 } else { 200 };
const IN_FLIGHT: usize = 16;

fn shared() -> (Region, File) {
    let Settings { index_memory_bytes, seed, hash_seed, .. } = settings();
    Region::shared(PROCESSES, index_memory_bytes, seed, hash_seed).unwrap()
}

fn router_with_workers(workers: usize) -> (Arc<Router>, File) {
    let (region, file) = shared();
    let router = Router::on(region, Slab::new(vec![]), settings()).unwrap();
    for _ in 0..workers {
        let slots = router.add_worker(&[MODEL.to_owned()], 1, 1_000, None).unwrap();
        router.observe_probe(slots[0], true).unwrap();
    }
    (router, file)
}

/// This test program again, as process `process` of the region in `file`, doing `task`.
fn spawn(file: &File, process: usize, task: &str) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["another_process", "--exact", "--nocapture"]);
    command.env(TASK, format!("{} {process} {task}", file.as_raw_fd())).stdout(Stdio::null()).spawn().unwrap()
}

/// Not a test of its own: what the other processes run.
#[test]
fn another_process() {
    let Ok(task) = env::var(TASK) else { return };
    let words: Vec<&str> = task.split(' ').collect();
    if words[2] == "crash" {
        crash(Path::new(words[3]));
    }
    let file = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", words[0])).unwrap();
    let process: usize = words[1].parse().unwrap();
    let region = Region::attach(&file, PROCESSES, settings().index_memory_bytes, process).unwrap();
    match words[2] {
        "route" => {
            work(&Router::on(region, Slab::new(vec![]), settings()).unwrap(), process as u64, words[3].parse().unwrap())
        }
        "die" => {
            let _guard = region.lock().unwrap();
            std::process::abort();
        }
        "hang" => {
            let _guard = region.lock().unwrap();
            thread::sleep(Duration::from_secs(60));
        }
        other => panic!("{other}"),
    }
}

/// Select and release `leases` times, with up to [`IN_FLIGHT`] at once.
fn work(router: &Arc<Router>, seed: u64, leases: usize) {
    let mut draw = seed;
    let mut random = |bound: usize| {
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (draw >> 33) as usize % bound
    };
    let bodies: Vec<String> = (0..32)
        .map(|user| format!("{{\"model\": \"{MODEL}\", \"text\": \"{}\"}}", format!("user {user} ").repeat(100)))
        .collect();
    let mut in_flight: Vec<Lease> = Vec::new();
    for turn in 0..leases {
        let now_ns = turn as u64 * 1_000_000;
        let request = router.read(Endpoint::Generate, b"", bodies[random(bodies.len())].as_bytes(), now_ns).unwrap();
        in_flight.extend(router.select(&request, now_ns, false).unwrap());
        if in_flight.len() == IN_FLIGHT || random(3) == 0 {
            let lease = in_flight.swap_remove(random(in_flight.len()));
            let kind = if random(50) == 0 { OutcomeKind::Cancelled } else { OutcomeKind::Answered };
            let outcome = Outcome { kind, status: 200, prompt_tokens: 200, cached_tokens: 50, ..Outcome::CANCELLED };
            lease.release(&outcome, now_ns).unwrap();
        }
    }
}

fn assert_quiet(router: &Router) {
    router.check_integrity().unwrap();
    for target in router.targets().unwrap() {
        assert_eq!((target.load, target.outstanding_tokens), (0, 0), "slot {}", target.slot);
        assert!(target.available);
    }
}

#[test]
fn no_load_is_lost_or_leaked() {
    let (router, file) = router_with_workers(8);
    let mut others: Vec<Child> =
        (1..PROCESSES).map(|process| spawn(&file, process, &format!("route {LEASES}"))).collect();
    work(&router, 0, LEASES / 10);
    for other in &mut others {
        assert!(other.wait().unwrap().success());
    }
    assert_quiet(&router);
}

#[test]
fn a_killed_process_stops_nobody_and_leaves_nothing() {
    let (router, file) = router_with_workers(8);
    for kill in 0..KILLS {
        let mut victim = spawn(&file, 1, "route 1000000000");
        let deadline = Instant::now() + Duration::from_secs(20);
        while router.targets().unwrap().iter().all(|target| target.load == 0) {
            assert!(Instant::now() < deadline, "it never began");
            work(&router, kill, 1);
        }
        work(&router, kill, 50 + (kill as usize * 37) % 200);
        victim.kill().unwrap();
        victim.wait().unwrap();
        work(&router, kill, 100);
        router.clear_process(1).unwrap();
        assert_quiet(&router);
    }
}

#[test]
fn the_lock_of_the_dead_is_handed_on() {
    let (region, file) = shared();
    spawn(&file, 1, "die").wait().unwrap();
    assert!(region.lock().unwrap().from_the_dead());
    assert!(!region.lock().unwrap().from_the_dead());
}

#[test]
fn who_hangs_with_the_lock_costs_others_an_error_and_not_their_time() {
    let (region, file) = shared();
    let mut hanging = spawn(&file, 1, "hang");
    let deadline = Instant::now() + Duration::from_secs(20);
    let waited = loop {
        let begin = Instant::now();
        if let Err(error) = region.lock() {
            assert!(matches!(error, Error::RegionBusy));
            break begin.elapsed();
        }
        assert!(Instant::now() < deadline, "it never had the lock");
        thread::sleep(Duration::from_millis(5));
    };
    assert!((90..5_000).contains(&waited.as_millis()), "{waited:?}");
    hanging.kill().unwrap();
    hanging.wait().unwrap();
    assert!(region.lock().unwrap().from_the_dead());
}

#[test]
fn a_file_that_is_another_region_is_refused_with_the_reason() {
    let (_region, file) = shared();
    let attach = |processes, bytes, process| {
        Region::attach(&file, processes, bytes, process).err().expect("it is not that region").to_string()
    };
    let bytes = settings().index_memory_bytes;
    assert!(attach(PROCESSES, 2 * bytes, 1).contains("the region has"));
    assert!(attach(PROCESSES, bytes, PROCESSES).contains("process 3 of a region for 3"));
    let other = tempfile_of(&file);
    let refused = Region::attach(&other, PROCESSES, bytes, 1).err().expect("it is empty").to_string();
    assert!(refused.contains("header word 0"), "{refused}");
    assert_eq!(Region::attach(&file, PROCESSES, bytes, 1).unwrap().hash_seed(), settings().hash_seed);
}

/// A file of the same size with nothing in it.
fn tempfile_of(file: &File) -> File {
    let path = env::temp_dir().join(format!("warmroute-region-{}", std::process::id()));
    let other = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    other.set_len(file.metadata().unwrap().len()).unwrap();
    other
}

fn long_prompt(router: &Arc<Router>) -> Arc<Request> {
    let body = format!("{{\"text\": \"{}\"}}", "a prompt ".repeat(100));
    router.read(Endpoint::Generate, b"", body.as_bytes(), 0).unwrap()
}

/// Children that other tests start have the file, too, until they begin.
fn open_in(path: &Path, bytes: usize, hash_seed: u64, any_hash_seed: bool) -> std::io::Result<(Region, File, Found)> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match Region::in_file(path, 1, bytes, 7, hash_seed, any_hash_seed) {
            Err(busy) if busy.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// A router on a region in a file that dies with a request in flight.
fn crash(path: &Path) {
    let Settings { index_memory_bytes, .. } = settings();
    let (region, _file, _) = open_in(path, index_memory_bytes, 12, true).unwrap();
    let router = Router::on(region, Slab::new(vec![]), settings()).unwrap();
    let slots = router.add_worker(&[MODEL.to_owned()], 1, 1_000, None).unwrap();
    router.observe_probe(slots[0], true).unwrap();
    let _lease = router.select(&long_prompt(&router), 0, false).unwrap().unwrap();
    router.publish_registry(b"who is who").unwrap();
    std::process::abort();
}

#[test]
fn a_region_in_a_file_goes_on_after_its_router() {
    let path = env::temp_dir().join(format!("warmroute-test-region-{}", std::process::id()));
    let Settings { index_memory_bytes, .. } = settings();
    let open = |bytes, hash_seed, any| open_in(&path, bytes, hash_seed, any);
    let (region, file, found) = open(index_memory_bytes, 11, true).unwrap();
    assert_eq!(found, Found::New);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let busy = Region::in_file(&path, 1, index_memory_bytes, 7, 11, true).err().unwrap();
    assert_eq!(busy.kind(), ErrorKind::ResourceBusy);

    drop((region, file));
    assert!(!spawn(&File::open(&path).unwrap(), 0, &format!("crash {}", path.display())).wait().unwrap().success());

    let (region, file, found) = open(index_memory_bytes, 12, true).unwrap();
    assert_eq!((found, region.hash_seed()), (Found::Kept, 11));
    let router = Router::on(region, Slab::new(vec![]), settings()).unwrap();
    let slots = router.take_over().unwrap();
    assert_eq!(slots, [0]);
    assert_eq!(router.registry().unwrap(), (1, b"who is who".to_vec()));
    let target = router.target(slots[0]).unwrap();
    assert_eq!((target.load, target.health, target.available), (0, "pending", false));
    router.check_integrity().unwrap();
    assert!(router.select(&long_prompt(&router), 0, false).unwrap().is_none());
    router.observe_probe(slots[0], true).unwrap();
    let lease = router.select(&long_prompt(&router), 0, false).unwrap().unwrap();
    assert!(lease.match_bytes() > 800, "{} bytes", lease.match_bytes());
    drop((lease, router, file));

    let replaced = |found: Found| if let Found::Replaced(reason) = found { reason } else { panic!("{found:?}") };
    let (region, file, found) = open(index_memory_bytes, 12, false).unwrap();
    assert_eq!((replaced(found).contains("--hash-seed"), region.hash_seed()), (true, 12));
    drop((region, file));
    assert!(replaced(open(2 * index_memory_bytes, 12, false).unwrap().2).contains("--index-memory"));
    // The word that says of which start of the machine it is.
    File::options().write(true).open(&path).unwrap().write_all_at(&[1; 8], 7 * 8).unwrap();
    assert!(replaced(open(2 * index_memory_bytes, 12, false).unwrap().2).contains("machine was started"));

    for content in [&b"a diary"[..], &[b'x'; 10_000]] {
        std::fs::write(&path, content).unwrap();
        assert_eq!(open(index_memory_bytes, 12, false).err().unwrap().kind(), ErrorKind::InvalidData);
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
    std::fs::remove_file(&path).unwrap();
}
